# SPDX-License-Identifier: Apache-2.0
"""Experiments: one file per table or figure. They may import everything; nothing but the command line imports them."""
