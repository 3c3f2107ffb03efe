"""A read API as huggingface_hub speaks it, and import of adapters from any such hub."""
