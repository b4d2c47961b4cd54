"""The command ``geotucker train``: a network in Tucker format beside its dense baseline."""
