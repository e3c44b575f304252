"""Parts of `gns.hessian`: signed sums, products with the Hessian, and what is concluded from them.

Letters beyond the package's own: K examples' weighted sums a parameter, S probes, M parts of the examples
that the Hessian is taken on, P parameters.
"""
