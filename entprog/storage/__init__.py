"""Folders and files on a disk or behind s3:// and gs://, read in the parts that are needed."""

from entprog.storage.copies import below, fetched, local_copy, remove, scratch_for
from entprog.storage.place import PROBE, Place, Where, address, answered, at, inside, quickly, within

__all__ = [
    "PROBE", "Place", "Where", "address", "answered", "at", "below", "fetched", "inside", "local_copy", "quickly",
    "remove", "scratch_for", "within",
]  # fmt: skip
