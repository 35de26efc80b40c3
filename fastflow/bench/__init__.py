"""The benchmark behind ``fastflow bench``: one file of rows per family, as in :mod:`fastflow.testing`.

``row`` says what a row is and ``contest`` measures it: ``suite`` on the CPU, under pytest-benchmark, ``device`` on a
GPU, for ``gpu``, the program behind ``make gpu``. ``machine`` measures what the hardware allows, ``table`` prints.
"""
