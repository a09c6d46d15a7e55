# SPDX-License-Identifier: Apache-2.0
"""One file per experiment; each defines `STUDY` (`steadyvq.experiments.study`)."""
