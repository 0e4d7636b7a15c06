"""What tests share: small models, runs and data, reference implementations, faults. There is no
test here, and no test file imports another one.
"""
