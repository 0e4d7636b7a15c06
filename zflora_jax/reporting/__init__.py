"""Files written whole, provenance, tables, metrics, plots.

There is no model and no data here: values come as plain dicts.
"""
