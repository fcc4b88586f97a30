"""The checker that tests put around every function of the package: shapes, dtypes and plain types."""

from beartype import BeartypeConf, beartype

# an int where a float is asked for is no mistake (PEP 484)
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
