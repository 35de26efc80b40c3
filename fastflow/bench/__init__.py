"""The benchmark behind ``fastflow bench``: one file of rows per family, as in :mod:`fastflow.testing`.

``row`` says what a row is, ``suite`` runs it under pytest-benchmark, ``machine`` measures what the hardware allows,
``table`` prints the result.
"""
