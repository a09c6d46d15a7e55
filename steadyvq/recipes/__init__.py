# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files that `steadyvq train` takes by name."""
