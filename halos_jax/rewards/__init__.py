"""Rewards: models, functions and judges, and the feedback made of their scores."""
