"""Rewards of responses: verifiers, reward models, a judge; every one can be killed and started again."""
