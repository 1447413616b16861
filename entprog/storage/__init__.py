"""Folders and files on a disk or behind s3:// and gs://, read in the parts that are needed."""

from entprog.storage.place import Place, Where, address, at, inside, quickly

__all__ = ["Place", "Where", "address", "at", "inside", "quickly"]
