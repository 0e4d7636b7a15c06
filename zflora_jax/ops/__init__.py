"""Operations in the forms that compilers run best, which tests compare with plain ones.

No modules and no parameter trees; a trick for a compiler or a device lives here and nowhere else.
"""
