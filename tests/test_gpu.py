"""Everything runs on a CUDA device as on the CPU."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyroflows as pf
from tests.batteries import REGISTERED, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", REGISTERED, ids=lambda case: case.name)
def test_flows_agree_with_the_cpu(case: Case) -> None:
    flow, x = case.bound(), case.inputs(20)
    expected, expected_log_det = flow.forward_and_log_det(x)
    flow.cuda()
    y, log_det = flow.forward_and_log_det(x.cuda())
    again, inverse_log_det = flow.inverse_and_log_det(y)
    tolerance = case.within(1e-8)
    torch.testing.assert_close(y.cpu(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_det.cpu(), expected_log_det, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(again.cpu(), x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=tolerance, atol=tolerance)


def test_fit_runs_where_the_data_are_and_results_move() -> None:
    data = torch.tensor([1.0, 2.0, 3.0], device="cuda")

    def model(data):
        mean = pyro.sample("mean", dist.Normal(torch.zeros_like(data[0]), 10.0))
        with pyro.plate("data", len(data)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=data)

    result = pf.fit(model, pf.AutoSpline(model, num_layers=2), (data,), 200, progress=False)
    assert result.draws.is_cuda
    # The posterior is Normal(1.993, 0.576); 10 000 draws give the mean to 0.006.
    assert result.sample(10_000)["mean"].mean().item() == pytest.approx(1.993, abs=0.03)
    assert result.to_arviz().posterior["mean"].shape == (1, 10_000)
    assert result.to("cpu").sample(10)["mean"].device.type == "cpu"
