"""Run folders: what lies in them, whole or not at all; who may write, and whether a recipe goes on with one."""
