"""Folders and files on a disk or behind s3:// and gs://, read in the parts that are needed."""
