"""Proofs about a recipe, on this machine, before it is launched: ``moefoundry verify``.

A recipe is shrunk to a twin that has the same parts in small sizes (:mod:`moefoundry.verify.twin`). Checks run the twin
on ranks that are forked here (:mod:`moefoundry.verify.ranks`) and compare what must be equal; each gives results with a
figure, its bound and the first difference (:mod:`moefoundry.verify.result`). A check is a function of the twin and the
ranks, listed in :mod:`moefoundry.verify.checks`; what it compares with is computed in another way than what it checks.
"""
