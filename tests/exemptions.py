# SPDX-License-Identifier: Apache-2.0
"""Which checks of tests/test_conformance.py a method is expected to fail, and why; docs/methods.md shows it as a table."""

GRIDS = ("bsq", "fsq", "fsq_symmetric", "ifsq", "lfq")

EXEMPT: dict[tuple[str, str], str] = {
    ("grouped", "test_index_is_the_nearest_row_of_the_codebook"): "one table per group (test_methods_wrappers.py)",
    ("residual", "test_index_is_the_nearest_row_of_the_codebook"): "one table per layer (test_methods_wrappers.py)",
    ("ema", "test_direct_gradient_goes_to_the_code"): "no gradient reaches a codebook of averages",
    ("soft_em", "test_direct_gradient_goes_to_the_code"): "no gradient reaches a codebook of averages",
    ("ibq", "test_index_is_the_nearest_row_of_the_codebook"): "takes the largest inner product, by definition",
    ("hypervq", "test_index_is_the_nearest_row_of_the_codebook"): "takes the farthest hyperplane, by definition",
    **{(name, "test_direct_gradient_goes_to_the_code"): "a fixed grid refuses this estimator" for name in GRIDS},
    **{(name, "test_a_broken_latent_spoils_no_code"): "a fixed grid has no state to spoil" for name in GRIDS},
    ("bsq", "test_straight_through_gradient"): "by definition it passes through the map to the sphere",
    ("fsq", "test_straight_through_gradient"): "by definition it passes through the bound",
    ("fsq_symmetric", "test_straight_through_gradient"): "by definition it passes through the bound",
    ("ifsq", "test_straight_through_gradient"): "by definition it passes through the bound",
}
"""(method, check) -> reason."""
