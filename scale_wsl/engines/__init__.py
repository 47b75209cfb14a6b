"""How the trunk is sharded over ranks: one small protocol, one file for each engine behind it."""
