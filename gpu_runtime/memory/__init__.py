"""The paged pool that KV and adapter weights share: pages, the layout of a page, adapter plans, slot tables."""
