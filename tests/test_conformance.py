# SPDX-License-Identifier: Apache-2.0
"""Every registered quantizer against the shared contract; tests/exemptions.py says where a method cannot meet it, and why."""

import warnings

import pytest
import torch
from cases import LAYOUTS, NAMES, build, layout_shape, normal, same, seen, state, trains_otherwise
from exemptions import EXEMPT
from two_processes import one_step, split_step

import steadyvq
from steadyvq.quantizers.scalar import ScalarQuantizer
from steadyvq.quantizers.vector import VectorQuantizer


@pytest.fixture(autouse=True)
def exemptions(request: pytest.FixtureRequest) -> None:
    """Expects a method to fail the checks that it is exempt from; where it does not, the exemption goes."""
    reason = EXEMPT.get((request.node.callspec.params["name"], request.function.__name__))
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.mark.conformance
@pytest.mark.parametrize("name", NAMES)
class TestContract:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("training", [True, False])
    def test_decode_gives_the_forward_vectors(self, name, layout, dtype, training):
        vq = build(name, channel_axis=LAYOUTS[layout][1]).train(training)
        shape, axis = layout_shape(layout, vq.dim)
        latents = normal(*shape).to(dtype)
        z_q, indices, loss = vq(latents)
        assert z_q.shape == latents.shape
        assert z_q.dtype == dtype
        assert indices.dtype == torch.int64
        grid = list(shape)
        grid.pop(axis)
        assert indices.shape == vq.index_shape(grid)
        assert loss.shape == ()
        # Where training substitutes the code by definition, it must show.
        exact = vq.exact_in_training or not training
        assert torch.equal(z_q, vq.decode(indices, dtype=dtype)) == exact
        assert torch.equal(indices, vq.encode(latents))

    def test_layouts_agree(self, name):
        rows = build(name)
        image = build(name, channel_axis=1)
        image.load_state_dict(rows.state_dict())
        latents = normal(2, 5, 4, rows.dim)
        a, b = rows(latents), image(latents.movedim(-1, 1))
        assert torch.equal(a.indices, b.indices)
        assert torch.equal(a.z_q.movedim(-1, 1), b.z_q)
        assert torch.equal(a.loss, b.loss)

    @pytest.mark.parametrize("training", [True, False])
    def test_a_latent_has_one_token_at_any_batch_size(self, name, training):
        vq = build(name).train(training)
        if training and "assignment" in vq.batch_coupled:
            pytest.skip("in training the batch is assigned as a whole, by definition")
        z = normal(130, vq.dim)
        found = []
        for first, last in ((0, 1), (1, 8), (8, 72), (72, 130)):
            vq.first_item = first
            found.append(vq(z[first:last]))
        vq.first_item = 0
        whole = vq(z)
        assert torch.equal(whole.indices, torch.cat([out.indices for out in found]))
        assert torch.equal(whole.indices, vq.encode(z))

    def test_index_is_the_nearest_row_of_the_codebook(self, name):
        vq = build(name)
        if trains_otherwise(vq):
            vq.eval()
        z = normal(300, vq.dim)
        out = vq(z)
        # Grids bound or normalise the latents first: the record holds them where the codes live.
        where = out.assignment.z if isinstance(vq, ScalarQuantizer) else seen(vq, z)
        expected = (where[:, None].double() - vq.codebook()[None].double()).square().sum(-1).argmin(1)
        assert torch.equal(out.indices, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_changes_nothing(self, name, dtype):
        vq = build(name)
        z = normal(300, vq.dim)
        plain = vq(z)
        with torch.autocast("cpu", dtype=dtype):
            cast = vq(z)
            decoded = vq.decode(cast.indices)
        assert torch.equal(plain.indices, cast.indices)
        assert torch.equal(plain.loss, cast.loss)
        assert torch.equal(plain.z_q, cast.z_q)
        assert torch.equal(decoded, cast.z_q) == vq.exact_in_training

    @pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
    def test_masked_garbage_changes_nothing(self, name, garbage):
        vq = clean = build(name, channel_axis=1)
        padded = build(name, channel_axis=1)
        latents = normal(2, vq.dim, 30).requires_grad_()
        mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 2
        mask[:, 30:] = False
        filled = torch.cat([latents.detach(), torch.full((2, vq.dim, 10), garbage)], 2).requires_grad_()
        a, b = clean(latents), padded(filled, mask)
        assert torch.equal(a.indices, b.indices[:, :30])
        assert (b.indices[:, 30:] == -1).all()
        assert torch.equal(a.z_q, b.z_q[:, :, :30])
        assert torch.equal(filled[:, :, 30:].isnan(), b.z_q[:, :, 30:].isnan())
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-6, atol=0)
        for key in a.stats:
            torch.testing.assert_close(a.stats[key], b.stats[key], rtol=1e-5, atol=1e-9)
        for out, x in ((a, latents), (b, filled)):
            (out.loss + (out.z_q[:, :, :30] * normal(2, vq.dim, 30, seed=3)).sum()).backward()
            assert x.grad is not None
        torch.testing.assert_close(latents.grad, filled.grad[:, :, :30])
        assert (filled.grad[:, :, 30:] == 0).all()
        for p, q in zip(clean.parameters(), padded.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        assert clean.update(a) == padded.update(b)
        torch.testing.assert_close(state(clean), state(padded))

    def test_everything_masked_is_harmless(self, name):
        vq = build(name)
        latents = torch.full((4, vq.dim), float("nan"), requires_grad=True)
        out = vq(latents, torch.zeros(4, dtype=torch.bool))
        assert out.loss == 0
        vq.update(out)
        assert all(value.isfinite().all() for value in vq.state_dict().values())

    @pytest.mark.parametrize("training", [True, False])
    def test_forward_is_pure(self, name, training):
        vq = build(name).train(training)
        before = state(vq)
        first, second = vq(normal(50, vq.dim)), vq(normal(50, vq.dim))
        assert same(before, state(vq))
        assert torch.equal(first.loss, second.loss)

    def test_update_does_nothing_in_evaluation(self, name):
        vq = build(name).eval()
        before = state(vq)
        vq.update(vq(normal(50, vq.dim)))
        assert same(before, state(vq))

    def test_global_random_state_is_left_alone(self, name):
        before = torch.get_rng_state()
        vq = build(name)
        vq.update(vq(normal(50, vq.dim)))
        assert torch.equal(before, torch.get_rng_state())

    def test_state_dict_round_trip(self, name):
        vq = build(name)
        for seed in range(5):
            vq.update(vq(normal(50, vq.dim, seed=seed)))
        other = steadyvq.build_quantizer(**vq.spec)
        other.load_state_dict(vq.state_dict())
        for seed in range(5, 8):
            a, b = vq(normal(50, vq.dim, seed=seed)), other(normal(50, vq.dim, seed=seed))
            assert torch.equal(a.loss, b.loss)
            vq.update(a), other.update(b)
        assert same(state(vq), state(other))

    def test_half_precision_parents_leave_the_state_in_float32(self, name):
        vq = build(name)
        parent = torch.nn.Sequential(torch.nn.Linear(vq.dim, vq.dim), vq)
        for convert in (parent.half, parent.bfloat16, lambda: parent.to(torch.bfloat16)):
            convert()
            assert parent[0].weight.element_size() == 2
            assert all(v.dtype in (torch.float32, torch.int64) for v in parent[1].state_dict().values())
        parent.double()
        assert parent[1].codebook().dtype == torch.float64
        assert parent[1](normal(5, vq.dim)).loss.dtype == torch.float64

    def test_bake_keeps_every_token_and_vector(self, name):
        vq = build(name, channel_axis=1)
        latents = normal(2, vq.dim, 9, 9)
        if trains_otherwise(vq):
            vq.eval()
        baked = vq.bake()
        assert torch.equal(vq(latents).z_q, baked(latents).z_q)
        assert torch.equal(vq(latents).indices, baked(latents).indices)
        assert not list(baked.parameters())

    def test_one_graph_for_all_batch_sizes(self, name):
        torch.compiler.reset()  # all methods share one forward, and a limit of eight compilations
        vq, plain = build(name), build(name)
        compiled = torch.compile(vq, fullgraph=True, dynamic=True, backend="aot_eager")
        for count in (50, 33, 81):
            z = normal(count, vq.dim).requires_grad_()
            upstream = normal(count, vq.dim, seed=2)
            # One forward and backward may compile; after it, whatever would compile again is an error.
            with torch.compiler.set_stance("default" if count == 50 else "fail_on_recompile"):
                outs = [plain(z), compiled(z)]
                a, b = ([out, *torch.autograd.grad(out.loss + (out.z_q * upstream).sum(), z)] for out in outs)
            assert torch.equal(a[0].indices, b[0].indices)
            torch.testing.assert_close([a[0].loss, a[0].z_q, a[1]], [b[0].loss, b[0].z_q, b[1]])
            plain.update(a[0]), vq.update(b[0])
        torch.testing.assert_close(state(plain), state(vq))

    def test_straight_through_gradient(self, name):
        vq = build(name, losses=dict.fromkeys(build(name).losses), estimator="straight_through")
        z = normal(50, vq.dim).requires_grad_()
        upstream = normal(50, vq.dim, seed=2)
        (vq(z).z_q * upstream).sum().backward()
        (expected,) = torch.autograd.grad((seen(vq, z) * upstream).sum(), z)
        torch.testing.assert_close(z.grad, expected, rtol=1e-5, atol=1e-7)
        assert getattr(vq, "unit_sphere", False) or torch.equal(z.grad, upstream)

    def test_direct_gradient_goes_to_the_code(self, name):
        vq = build(name, estimator="direct")
        z = normal(50, vq.dim).requires_grad_()
        upstream = normal(50, vq.dim, seed=2)
        out = vq(z)
        value = (out.z_q * upstream).sum()
        assert torch.autograd.grad(value, z, allow_unused=True, retain_graph=True)[0] is None
        parameters = [p for p in vq.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(value, parameters)
        assert any((g != 0).any() for g in gradients)
        expected = torch.autograd.grad((vq.decode(out.indices) * upstream).sum(), parameters)
        torch.testing.assert_close(gradients, expected)

    def test_bad_latents_and_masks(self, name):
        vq = build(name)
        with pytest.raises(ValueError, match=f"last dimension 5, but this quantizer has dim={vq.dim}: project before"):
            vq(normal(3, 5))
        with pytest.raises(ValueError, match="floating-point"):
            vq(torch.zeros(3, vq.dim, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"torch.bool of shape \(3,\)"):
            vq(normal(3, vq.dim), torch.ones(3))
        with pytest.raises(ValueError, match=r"torch.bool of shape \(3,\)"):
            vq(normal(3, vq.dim), torch.ones(4, dtype=torch.bool))
        with pytest.raises(ValueError, match="channel_axis=1"):
            build(name, channel_axis=1)(normal(vq.dim))

    @pytest.mark.parametrize("broken", [float("nan"), float("inf")])
    def test_a_broken_latent_spoils_no_code(self, name, broken):
        vq = build(name, maintenance=replacement(name), temperature={"effective_losers": 4})
        for step in range(20):
            z = normal(32, vq.dim, seed=step) + 5
            if step == 3:
                z[7, 2] = broken
            vq.update(vq(z))
        assert all(value.isfinite().all() for value in vq.state_dict().values())

    def test_reminds_once_when_update_is_forgotten(self, name):
        vq = build(name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(30):
                vq(normal(4, vq.dim))
        reminders = [w for w in caught if "without `update`" in str(w.message)]
        assert len(reminders) == (1 if vq.needs_update else 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message=".*couples all latents")
            vq = build(name)
            for _ in range(3):
                # Where a loss couples the batch, several outputs would warn of that instead.
                vq.update([vq(normal(4, vq.dim)) for _ in range(1 if vq.batch_coupled else 9)])
            for _ in range(30):
                vq(normal(4, vq.dim))

    def test_update_and_decode_say_what_they_need(self, name):
        vq = build(name)
        out = vq(normal(4, vq.dim))
        with pytest.raises(ValueError, match="not given what forward returned"):
            vq.update(list(out))
        with pytest.raises(ValueError, match="optimizer is a list"):
            vq.update(out, [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)])
        with pytest.raises(ValueError, match=f"but this quantizer has {vq.num_codes} codes"):
            vq.decode(torch.full(vq.index_shape((1,)), vq.num_codes))
        with pytest.raises(ValueError, match="named by integers"):
            vq.decode(torch.ones(vq.index_shape((1,))))
        nowhere = torch.full(vq.index_shape((1,)), -1)
        assert torch.equal(vq.decode(nowhere), torch.zeros(1, vq.dim))

    def test_accumulated_micro_batches_equal_the_large_batch(self, name):
        vq = large = build(name).double()
        small = build(name).double()
        for step in range(30):
            z = normal(64, vq.dim, seed=step).double()
            large.update(large(z))
            outs = []
            for first in range(0, 64, 16):
                small.first_item = first
                outs.append(small(z[first : first + 16]))
            small.update(outs)
        torch.testing.assert_close(state(large), state(small))

    def test_two_processes_equal_one(self, name):
        """Unequal shares, masked latents, codes replaced: averaged gradients and states are those of the whole batch."""
        parts = replacement(name)
        vq = one = build(name, **({"maintenance": parts} if parts else {})).double()
        events = {}
        for step in range(8):
            z, upstream = normal(24, vq.dim, seed=step).double(), normal(24, vq.dim, seed=50 + step).double()
            mask = torch.rand(24, generator=torch.Generator().manual_seed(step)) < 0.8
            grads, _, out = one_step(one, z, mask, upstream)
            averaged, (vq, other) = split_step(vq, z, mask, upstream, cut=7)
            torch.testing.assert_close(averaged, grads, rtol=1e-8, atol=1e-12)
            for key, value in one.update(out).items():
                events[key] = events.get(key, 0) + value
            assert same(state(vq), state(other))
            torch.testing.assert_close(state(vq), state(one))
        assert not parts or events["replaced"] > 0


def replacement(name: str) -> dict[str, object]:
    """Maintenance that replaces codes within a few steps, where the codes of a method can be copied."""
    vq = build(name)
    cannot = isinstance(vq, ScalarQuantizer) or (isinstance(vq, VectorQuantizer) and vq.codes.cannot_copy)
    return {} if cannot else {"replace": {"patience": 0.5, "cap": 1.0}}
