"""Devices and processes: the mesh, how parameters are divided over it, hosts, the compile cache.

No model: parameters are names and shapes here.
"""
