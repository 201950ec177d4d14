"""The binary format of CIFAR: records of a label and an image, channel by channel, row by row.

Alex Krizhevsky's page on CIFAR-10 and CIFAR-100 describes the format. Records of CIFAR-100 begin
with two labels, the coarse one and the fine one.
"""

import numpy as np
from numpy.typing import NDArray

from cnnlib.errors import DataError

Bytes = NDArray[np.uint8]


def parse_cifar(
    data: bytes | bytearray, shape: tuple[int, int, int], label_bytes: int, where: str
) -> tuple[Bytes, Bytes]:
    """(images (N, C, H, W), labels (N,)) of a file's bytes, the last label of each record.

    Raises DataError that begins with `where` unless the file is made of whole records.
    """
    record = label_bytes + shape[0] * shape[1] * shape[2]
    if not data or len(data) % record:
        raise DataError(
            f"{where} is truncated or another format: its {len(data)} bytes are no whole number of "
            f"records of {record} ({label_bytes} for labels, the others for an image of {shape})"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, *shape), records[:, label_bytes - 1]
