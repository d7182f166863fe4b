"""The command line: the one place of this folder that may import the indexes, environments and trainers."""
