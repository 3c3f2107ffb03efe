"""The frozen models that adapters are made for."""
