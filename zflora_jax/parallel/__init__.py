"""Devices and processes: the mesh, the division of parameters over it, hosts, the compile cache.

There is no model here: parameters are names and shapes.
"""
