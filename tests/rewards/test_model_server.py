"""The server of a reward model, as a process; and the supervisor that keeps it alive."""

import asyncio
import math
import os
import re
import select
import signal
import subprocess
import sys

import httpx
import pytest

from asyncrl.errors import ModelError
from asyncrl.rewards.model_server import MAX_BODY_BYTES, Scorer
from asyncrl.rewards.servers import Probing, RewardModels
from tests.reward_model_folders import MAX_LENGTH, make_tiny_reward_model, scores_by_transformers

TEXTS = ["47+58=105", "x", "a much longer text, which needs padding beside it", "47+58=104"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module")
def url(folder):
    """A server started by hand."""
    command = [sys.executable, "-m", "asyncrl.rewards.model_server", str(folder), "--batch-size=3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert process.stdout.readline() == "ready\n"
        yield address
    finally:
        process.kill()
        process.wait()


def classify(url, **body):
    return httpx.post(f"{url}/classify", json=body, timeout=60, trust_env=False)


def rows(response):
    assert response.status_code == 200, response.text
    return [item["probs"] for item in response.json()["data"]]


def test_scores_are_those_of_the_model_whatever_they_were_padded_with(url, folder):
    expected = scores_by_transformers(folder, TEXTS)
    assert max(abs(a[0] - b[0]) for a in expected for b in expected) > 0.1  # else the next line would say little
    found = rows(classify(url, input=TEXTS, use_activation=False))
    assert found == [pytest.approx(row, abs=1e-4) for row in expected]


def test_one_text_is_a_list_of_one_and_a_single_score_is_activated_by_a_sigmoid(url, folder):
    ((expected,),) = scores_by_transformers(folder, TEXTS[:1])
    for body in ({"use_activation": True}, {}):
        share = pytest.approx(1 / (1 + math.exp(-expected)), abs=1e-4 / 4)  # no sigmoid is steeper
        assert rows(classify(url, input=TEXTS[0], **body)) == [[share]]


def test_messages_are_scored_in_the_models_own_chat_template(url, folder):
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]
    expected = scores_by_transformers(folder, ["u:2+2|a:4|"])
    found = rows(classify(url, messages=messages, use_activation=False))
    assert found == [pytest.approx(expected[0], abs=1e-4)]


def test_an_answer_has_the_fields_of_vllms(url):
    answer = classify(url, input=["ab", "cde"]).json()
    assert {"object", "created", "model", "data", "usage"} <= answer.keys()
    assert [item["index"] for item in answer["data"]] == [0, 1]
    assert answer["data"][0]["num_classes"] == 1 and answer["data"][0]["label"] == "LABEL_0"
    assert answer["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"input": "x" * (MAX_LENGTH + 1)}, "129. tokens; this model takes 1 to 128"),
        ({"input": ""}, "0 tokens|\\[0\\]"),
        ({"input": []}, "1 to 64"),
        ({"input": ["x"] * 65}, "1 to 64"),
        ({"input": [1]}, "must be a text"),
        ({}, "must be a text"),
        ({"messages": 3}, "Error"),
    ],
)
def test_what_cannot_be_scored_is_the_clients_error(url, body, says):
    response = classify(url, **body)
    assert response.status_code == 400
    assert re.search(says, response.json()["error"]["message"])


def test_other_paths_bad_json_and_huge_bodies_are_refused_and_the_server_goes_on(url):
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        assert client.post("/score", json={}).status_code == 404
        assert client.get("/metrics").status_code == 404
        assert client.post("/classify", content=b"{").status_code == 400
        assert client.post("/classify", content=b"[1]").status_code == 400
        assert client.post("/classify", content=b" " * (MAX_BODY_BYTES + 1)).status_code == 413
        assert client.get("/health").status_code == 200
        assert rows(client.post("/classify", json={"input": "ok"}))


def test_a_model_without_a_padding_token_and_with_several_labels(tmp_path):
    """Nothing can be padded, so texts are scored one by one."""
    folder = make_tiny_reward_model(tmp_path / "three", num_labels=3, padding=False)
    scorer = Scorer(str(folder), device="cpu")
    assert (scorer.batch_size, scorer.num_labels) == (1, 3)
    (ids,) = scorer.encode({"input": TEXTS[0]})
    (found,) = scorer.score([ids])
    assert found == pytest.approx(scores_by_transformers(folder, TEXTS[:1])[0], abs=1e-4)
    assert sum(scorer.activated(found)) == pytest.approx(1.0)


# -- supervisor


def supervised(work, parts, **settings):
    async def run():
        models = RewardModels(parts, **settings)
        try:
            async with asyncio.timeout(240):
                await models.start()
                return await work(models)
        finally:
            await models.close()

    return asyncio.run(run())


async def scored(url, text="x"):
    async with httpx.AsyncClient(trust_env=False, timeout=60) as client:
        return (await client.post(f"{url}/classify", json={"input": text, "use_activation": False})).json()["data"]


async def until(condition):
    while not condition():
        await asyncio.sleep(0.02)


def test_parts_given_by_folder_get_an_address_and_others_stay_as_they_are(folder):
    overlong = {"kind": "overlong", "max_tokens": 8, "margin": 4}
    models = RewardModels({"rm": {"kind": "reward_model", "path": str(folder), "label": 0}, "long": overlong})
    asyncio.run(models.close())
    assert models.parts["long"] == overlong
    rm = models.parts["rm"]
    assert rm["url"].startswith("http://127.0.0.1:") and rm["label"] == 0 and "path" not in rm


@pytest.mark.slow
def test_a_server_that_is_killed_or_no_longer_answers_comes_back_at_the_same_address(folder, tmp_path):
    async def work(models):
        (server,) = models._servers
        scores, pids = [await scored(server.url)], []
        for number in (signal.SIGKILL, signal.SIGSTOP):
            pids.append(server.pid)
            os.kill(server.pid, number)
            await until(lambda: server.pid != pids[-1])
            # Asked while nobody is there: the request waits in the socket for the next server.
            scores.append(await scored(server.url))
        return scores, [*pids, server.pid]

    parts = {"rm": {"kind": "reward_model", "path": str(folder)}}
    probing = Probing(every_s=0.5, timeout_s=2.0)
    scores, pids = supervised(work, parts, log_prefix=str(tmp_path / "generator"), probing=probing)
    assert scores[0] == scores[1] == scores[2]
    assert len(set(pids)) == 3
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_a_model_that_cannot_be_loaded_is_said_at_the_start_with_its_reason(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "qwen2"}')
    parts = {"rm": {"kind": "reward_model", "path": str(tmp_path / "broken")}}
    with pytest.raises(ModelError, match=r"reward.parts.rm.path=.*exit code 1: .+ \(log: .*rm.log\)"):
        supervised(lambda models: None, parts, log_prefix=str(tmp_path / "generator"))


def test_servers_die_with_a_killed_daemon(folder):
    program = f"""
import asyncio
from asyncrl.rewards.servers import RewardModels

async def main():
    models = RewardModels({{"rm": {{"kind": "reward_model", "path": {str(folder)!r}}}}})
    await models.start()
    print(models._servers[0].pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""
    daemon = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        server = os.pidfd_open(int(daemon.stdout.readline()))
    finally:
        daemon.kill()
        daemon.wait(10)
    ready, _, _ = select.select([server], [], [], 10.0)
    os.close(server)
    assert ready, "the server is still running"
