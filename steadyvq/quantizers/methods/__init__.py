# SPDX-License-Identifier: Apache-2.0
"""One file per published method: its equations and sources, the parts only it has, and its choice of parts."""
