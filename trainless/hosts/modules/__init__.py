"""Seams on any module: a wrapper around its call, and changes to what modules inside it are given."""
