"""Secrets that a tenant hands over to be used on its behalf, such as a Hub token. Written, replaced, never shown."""
