"""Applies the part of an adapter that torch computes: PEFT, routers, embeddings, words."""
