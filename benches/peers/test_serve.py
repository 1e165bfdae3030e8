"""The protocol of `torch_lora.py --serve`, held against a running server: python -m unittest discover benches/peers"""

import json
import subprocess
import sys
import unittest
from pathlib import Path

SCRIPT = Path(__file__).with_name("torch_lora.py")
CASE = {"d": 37, "k": 29, "dtype": "f32", "segments": 3, "tokens_per_segment": [5, 1, 11], "rank": 3}
MEASUREMENT = {
    "device": str,
    "d": int,
    "k": int,
    "dtype": str,
    "tokens": int,
    "segments": int,
    "rank": int,
    "adapter": str,
    "lowering": str,
    "floor_seconds": float,
}


class Serve(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        command = [sys.executable, SCRIPT, "--serve", "--settle", "0"]
        cls.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        cls.greeting = json.loads(cls.server.stdout.readline())

    @classmethod
    def tearDownClass(cls):
        cls.server.stdin.close()
        assert cls.server.stdout.read() == b"", "more answers than requests"
        cls.server.stdout.close()
        assert cls.server.wait(timeout=60) == 0

    def ask(self, request):
        line = request if isinstance(request, bytes) else json.dumps(request).encode()
        self.server.stdin.write(line + b"\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def refused(self, request, why):
        reply = self.ask(request)
        self.assertEqual(list(reply), ["error"])
        self.assertIn(why, reply["error"])

    def test_greets(self):
        self.assertEqual(self.greeting["protocol"], 1)
        self.assertEqual(set(self.greeting), {"protocol", "device", "threads"})

    def test_prepares_runs_and_drops(self):
        case = self.ask(CASE)
        self.assertEqual(list(case["variants"]), ["base", "lora", "flora", "flora_einsum"])
        kinds = {
            name: {key: type(value) for key, value in described.items()} for name, described in case["variants"].items()
        }
        self.assertEqual(kinds, dict.fromkeys(kinds, MEASUREMENT))
        ranks = {name: described["rank"] for name, described in case["variants"].items()}
        self.assertEqual(ranks, {"base": 0, "lora": 3, "flora": 3, "flora_einsum": 3})
        floras = [described for described in case["variants"].values() if described["adapter"] == "flora"]
        self.assertEqual([described["lowering"] for described in floras], ["stacked", "einsum"])
        self.assertTrue(all(described["tokens"] == 17 for described in case["variants"].values()))
        other = self.ask(CASE | {"tokens_per_segment": 2, "variants": ["flora"]})
        self.assertEqual((other["id"], list(other["variants"])), (case["id"] + 1, ["flora"]))
        for name in case["variants"]:
            reply = self.ask({"run": case["id"], "variant": name})
            self.assertEqual((reply["run"], reply["variant"]), (case["id"], name))
            self.assertGreater(reply["seconds"], 0)
        self.refused({"run": other["id"], "variant": "base"}, "this case has flora")
        self.assertEqual(self.ask({"drop": case["id"]}), {"drop": case["id"]})
        self.refused({"run": case["id"], "variant": "base"}, "no prepared case")
        self.refused({"drop": case["id"]}, "no prepared case")

    def test_refuses_what_it_cannot_serve(self):
        for request, why in [
            (b"{", "not JSON"),
            (b"\xff", "not JSON"),
            (b"[" * 60000, "not JSON"),
            (b"[1]", "JSON object"),
            (b"{}", "missing: d"),
            (b" " * 200000 + b"{}", "longer than"),
            ({"run": 1000, "variant": "base"}, "no prepared case"),
            ({"run": [], "variant": "base"}, "no prepared case"),
            ({"run": True, "variant": "base"}, "no prepared case"),
            ({"run": 0}, "missing: variant"),
            ({"drop": 0.0}, "no prepared case"),
            (CASE | {"color": 1}, "unknown: color"),
            (CASE | {"d": 0}, "`d` is 0"),
            (CASE | {"k": -1}, "`k` is -1"),
            (CASE | {"k": 2.5}, "`k` is 2.5"),
            (CASE | {"rank": True}, "`rank` is True"),
            (CASE | {"rank": None}, "`rank` is None"),
            (CASE | {"rank": 10**100}, "`rank` is 1000"),
            (CASE | {"dtype": "f64"}, "`dtype` is 'f64'"),
            (CASE | {"dtype": {}}, "`dtype` is {}"),
            (CASE | {"segments": 4}, "3 lengths for 4 segments"),
            (CASE | {"tokens_per_segment": [5, 0, 1]}, "a length of"),
            (CASE | {"tokens_per_segment": "5"}, "`tokens_per_segment` is '5'"),
            (CASE | {"variants": []}, "`variants` is []"),
            (CASE | {"variants": ["dora"]}, "`variants` is ['dora']"),
            (CASE | {"variants": [[]]}, "`variants` is [[]]"),
            (CASE | {"d": 1 << 20, "k": 1 << 20}, "are free"),
        ]:
            with self.subTest(request=str(request)[:60]):
                self.refused(request, why)
        self.assertIn("id", self.ask(CASE))


if __name__ == "__main__":
    unittest.main()
