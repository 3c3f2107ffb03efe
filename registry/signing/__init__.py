"""Who vouches for an adapter: a tenant's public keys, its policy, and the signatures that pushes carry."""
