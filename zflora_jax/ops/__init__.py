"""Operations in the forms that compilers run best, which tests compare with plain ones.

There are no modules and no parameter trees here. Every trick for a compiler or a device is here.
"""
