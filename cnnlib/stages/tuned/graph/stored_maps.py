"""Maps that lie in device memory as the planes that tensor cores multiply."""

from typing import NamedTuple

from cnnlib.layers.pairs import Pair


class StoredMaps(NamedTuple):
    """Planes of vectors of eight channels: (plane, group of eight, image, row, column)."""

    batch: int = 1
    groups: int = 1
    rows: int = 1
    """Of an image, padding included."""
    pitch: int = 1
    """Vectors from a row to the next."""
    padding: Pair = (0, 0)
    vector_bytes: int = 4
    """Of eight numbers, in all planes."""
    spare_rows: int = 0
    """Rows behind the last one, which the tiles at the end copy too."""

    @property
    def words(self) -> int:
        """Words of 32 bits that the planes take, one where nothing is stored."""
        vectors = self.groups * self.batch * self.rows * self.pitch + self.spare_rows * self.pitch
        return vectors * self.vector_bytes // 4

    def constants(self) -> dict[str, int]:
        """The constants by which the layer before writes them."""
        return {
            "BATCH": self.batch,
            "NEXT_GROUPS": self.groups,
            "NEXT_PITCH": self.pitch,
            "NEXT_PADDING_ROWS": self.padding[0],
            "NEXT_PADDING_COLUMNS": self.padding[1],
        }
