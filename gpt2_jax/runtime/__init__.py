"""Devices, processes, the platform and the file system."""
