"""Windows along one direction of a map, of any size, stride and padding."""

from dataclasses import dataclass

from cnnlib.arithmetic import ceil_div


@dataclass(frozen=True)
class Windows:
    """`count` windows over `length` elements: the k-th one begins at element k stride - padding."""

    length: int
    size: int
    stride: int
    padding: int
    count: int

    @property
    def meetings(self) -> list[tuple[slice, slice]]:
        """For each place in a window: (windows with an element of the map there, these elements).

        The other windows have padding there.
        """
        found = []
        for place in range(self.size):
            begin = place - self.padding  # the element of window 0
            first = min(max(0, ceil_div(-begin, self.stride)), self.count)
            end = max(first, min(self.count, ceil_div(self.length - begin, self.stride)))
            start = first * self.stride + begin
            elements = slice(start, start + (end - first) * self.stride, self.stride)
            found.append((slice(first, end), elements))
        return found

    @property
    def cover(self) -> bool:
        """Whether every element of the map is in exactly one window, and no padding in any."""
        return self.stride == self.size and not self.padding and self.length % self.size == 0
