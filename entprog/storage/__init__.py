"""Folders and files on a disk or behind s3:// and gs://, read in the parts that are needed."""

from entprog.storage.place import Place, absolute, address, at, inside, quickly

__all__ = ["Place", "absolute", "address", "at", "inside", "quickly"]
