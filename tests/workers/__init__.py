"""Tests of the worker processes of one host."""
