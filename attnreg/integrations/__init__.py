"""Bridges to libraries whose models no one here wrote."""
