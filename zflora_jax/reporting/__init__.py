"""Files written whole, provenance, tables, metrics, plots.

No model and no data: values come in as plain dicts.
"""
