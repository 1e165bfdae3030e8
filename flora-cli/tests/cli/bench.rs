//! `flora bench`: what it measures, never how long that took.

use std::collections::BTreeSet;

use serde_json::Value;

use super::command::{answer, flora, stderr};
use super::world::World;

const KEYS: [&str; 15] = [
    "device",
    "d",
    "k",
    "dtype",
    "weight",
    "tokens",
    "segments",
    "rank",
    "adapter",
    "lowering",
    "seconds",
    "base_seconds",
    "ratio_to_base",
    "floor_seconds",
    "spread",
];

fn bench(more: &[&str]) -> Vec<String> {
    let fixed = ["bench", "layers", "--shape", "64,48", "--ranks", "3,1,3", "--rounds", "2"];
    fixed.iter().chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn text<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key].as_str().expect("text")
}

/// adapter, rank, lowering of every record of a batch of that many segments.
fn measured(records: &Value, segments: u64) -> BTreeSet<(String, u64, String)> {
    let records = records.as_array().expect("an array").iter();
    let of_batch = records.filter(|record| record["segments"] == segments && record["adapter"] != "mixed");
    let key = |record: &Value| {
        let rank = record["rank"].as_u64().expect("a number");
        (text(record, "adapter").to_owned(), rank, text(record, "lowering").to_owned())
    };
    of_batch.map(key).collect()
}

#[test]
fn every_lowering_of_every_adapter_is_measured() {
    let records = answer(bench(&["--tokens", "3x2", "--tokens", "1x5", "--json"]));
    for record in records.as_array().expect("an array") {
        let known: BTreeSet<_> = record.as_object().expect("an object").keys().map(String::as_str).collect();
        assert_eq!(known, BTreeSet::from(KEYS));
        assert_eq!((&record["d"], &record["k"]), (&64.into(), &48.into()));
        let number = |key: &str| record[key].as_f64().expect("a number");
        assert!(number("base_seconds") > 0.0 && number("floor_seconds") > 0.0);
        assert!((number("ratio_to_base") - number("seconds") / number("base_seconds")).abs() < 1e-9);
    }
    let mut expected = BTreeSet::from([("none".to_owned(), 0, "matmul".to_owned())]);
    let mut insert = |adapter: &str, ranks: &[u64], lowerings: &[&str]| {
        for rank in ranks {
            expected.extend(lowerings.iter().map(|lowering| (adapter.to_owned(), *rank, (*lowering).to_owned())));
        }
    };
    insert("lora", &[1, 3], &["fused", "segmented", "bmm"]);
    insert("flora", &[1, 3], &["stacked", "on_chip", "bmm"]);
    insert("hira", &[1, 3], &["stacked", "on_chip", "bmm"]);
    insert("ia3", &[0], &["stacked", "on_chip", "bmm"]);
    assert_eq!(measured(&records, 3), expected);
    // One adapter may own the batch.
    for (adapter, ranks) in [("lora", &[1, 3][..]), ("flora", &[1, 3]), ("hira", &[1, 3]), ("ia3", &[0])] {
        expected.extend(ranks.iter().map(|rank| (adapter.to_owned(), *rank, "merged".to_owned())));
    }
    assert_eq!(measured(&records, 1), expected);

    let mixed: BTreeSet<_> = (records.as_array().expect("an array").iter())
        .filter(|record| record["adapter"] == "mixed")
        .map(|record| (record["tokens"].as_u64(), record["rank"].as_u64(), text(record, "lowering")))
        .collect();
    assert_eq!(mixed.len(), 2 * 2 * 2, "{mixed:?}");
    assert!(mixed.contains(&(Some(6), Some(3), "stacked+fused")), "{mixed:?}");
}

#[test]
fn types_and_choices_are_kept() {
    let more = ["--tokens", "2x3", "--dtype", "f16,bf16", "--weight", "q4_0,int8", "--adapters", "flora"];
    let records = answer(bench(&[&more[..], &["--lowerings", "on_chip", "--json"]].concat()));
    let records = records.as_array().expect("an array");
    let of = |record: &Value| {
        [text(record, "dtype"), text(record, "weight"), text(record, "adapter"), text(record, "lowering")].join(" ")
    };
    let found: BTreeSet<_> = records.iter().map(of).collect();
    let expected = ["f16", "bf16"].iter().flat_map(|dtype| {
        let weights = ["q4_0", "int8"].iter();
        weights.flat_map(move |weight| {
            [format!("{dtype} {weight} none matmul"), format!("{dtype} {weight} flora on_chip")]
        })
    });
    assert_eq!(found, expected.collect());
    assert_eq!(records.len(), 4 * 3, "two ranks and the base of each choice of types");

    let output = flora(bench(&["--tokens", "2x3", "--adapters", "lora,mixed"]));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    for expected in ["d 64, k 48, f32, 2 segments of 3 tokens", "base", "fused", "mixed", "× base", "peaks: "] {
        assert!(table.contains(expected), "`{expected}` is not in: {table}");
    }
}

#[test]
fn the_papers_curves_are_measured() {
    let paper = |more: &[&str]| {
        let fixed =
            ["bench", "paper", "--models", "smollm2-135m", "--ranks", "3,1", "--tokens", "2x3", "--rounds", "1"];
        fixed.iter().chain(more).map(|argument| (*argument).to_owned()).collect::<Vec<_>>()
    };
    let records = answer(paper(&["--weight", "f32,q4_0", "--json"]));
    let records = records.as_array().expect("an array");
    let mut expected = BTreeSet::new();
    for (layer, weight) in [("q", "f32"), ("q", "q4_0"), ("k", "f32"), ("k", "q4_0")] {
        expected.insert(format!("self_attn.{layer}_proj {weight} none 0 matmul"));
        for variant in ["flora 1 stacked", "flora 1 on_chip", "lora 1 bmm", "lora 1 fused"] {
            expected.insert(format!("self_attn.{layer}_proj {weight} {variant}"));
            expected.insert(format!("self_attn.{layer}_proj {weight} {}", variant.replace('1', "3")));
        }
    }
    let of = |record: &Value| {
        let [layer, weight, adapter, lowering] =
            ["layer", "weight", "adapter", "lowering"].map(|key| text(record, key));
        format!("{layer} {weight} {adapter} {} {lowering}", record["rank"])
    };
    assert_eq!(records.iter().map(of).collect::<BTreeSet<_>>(), expected);
    assert_eq!(records.len(), expected.len());
    for record in records {
        let number = |key: &str| record[key].as_f64().expect("a number");
        assert_eq!((number("tokens"), number("segments"), number("d")), (6.0, 2.0, 576.0));
        assert!((number("tokens_per_second") * number("seconds") - 6.0).abs() < 1e-9);
        assert!(number("base_seconds") > 0.0 && number("spread") >= 0.0 && number("repetitions") >= 1.0);
    }

    let output = flora(paper(&[]));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    for expected in ["smollm2-135m self_attn.k_proj, d 576, k 192, f32", "flora on_chip", "than stacked"] {
        assert!(table.contains(expected), "`{expected}` is not in: {table}");
    }
    let output = flora(paper(&["--models", "gpt-5"]));
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let refused = |more: &[&str], code: i32, expected: &str| {
        let output = flora(bench(more));
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        assert!(stderr(&output).contains(expected), "`{expected}` is not in: {}", stderr(&output));
    };
    refused(&["--shape", "64"], 2, "there is no `,` in it");
    refused(&["--tokens", "0x8"], 2, "from 1 to 4096");
    refused(&["--dtype", "f8"], 2, "bf16");
    refused(&["--weight", "q5_9"], 2, "q4_1");
    refused(&["--lowerings", "quickly"], 2, "on_chip");
    refused(&["--device", "abacus"], 1, "no device `abacus`");
    refused(&["--peer", ""], 1, "is no command");
    refused(&["--peer", "/nowhere/python"], 1, "can't start the peer");
    refused(&["--shape", "40,8", "--weight", "q4_0", "--tokens", "1x1"], 1, "blocks of 32");
    refused(&["--tokens", "4096x65536"], 1, "too many");
}

/// A program that keeps the peers' protocol; its measurements are of rank 2.
#[cfg(unix)]
const PEER: &str = r#"
described() {
    printf '"%s": {"device": "the fake", "d": 64, "k": 48, "dtype": "f32", "tokens": 6, "segments": 2,' "$1"
    printf ' "rank": %s, "adapter": "%s", "lowering": "%s", "floor_seconds": 0.25}' "$2" "$3" "$4"
}
[ "$1" = --serve ] || exit 1
echo '{"protocol": 1, "device": "the fake", "threads": 1}'
while read -r line; do
    case "$line" in
    *'"run":7'*'"base"'*) echo '{"run": 7, "variant": "base", "seconds": 0.5}' ;;
    *'"run":7'*) echo '{"run": 7, "variant": "?", "seconds": 2.0}' ;;
    *'"drop":7'*) echo '{"drop": 7}' ;;
    *'"dtype":"bf16"'*) echo '{"error": "no bf16 here"}' ;;
    *'"dtype":"f16"'*) echo 'what?' ;;
    *'"rank":2'*)
        printf '{"id": 7, "variants": {'
        described base 0 none matmul; printf ', '
        described lora 2 lora bmm; printf ', '
        described flora 2 flora stacked; printf ', '
        described flora_einsum 2 flora einsum
        echo '}}' ;;
    *) exit 1 ;;
    esac
done
"#;

#[cfg(unix)]
#[test]
fn a_peer_is_measured_beside_flora() {
    let world = World::new();
    let peer = format!("sh '{}'", world.write("peer script.sh", PEER).to_string_lossy());
    let with = |more: &[&str]| {
        let fixed = ["bench", "layers", "--shape", "64,48", "--ranks", "2", "--tokens", "2x3", "--rounds", "3"];
        let adapters = ["--adapters", "lora,flora,ia3", "--peer", &peer];
        fixed.iter().chain(&adapters).chain(more).map(|argument| (*argument).to_owned()).collect::<Vec<_>>()
    };
    let records = answer(with(&["--json"]));
    let records = records.as_array().expect("an array");
    let (own, theirs) = records.split_at(records.len() - 4);
    assert!(own.iter().all(|record| text(record, "device").ends_with("(host)")), "{own:?}");
    let theirs: Vec<_> = theirs
        .iter()
        .map(|record| {
            assert_eq!((&record["device"], &record["floor_seconds"]), (&"the fake".into(), &0.25.into()));
            let key = [text(record, "adapter"), text(record, "lowering")].join(" ");
            (key, record["seconds"].as_f64(), record["ratio_to_base"].as_f64())
        })
        .collect();
    let adapted = ["lora bmm", "flora stacked", "flora einsum"].map(|key| (key, 2.0, 4.0));
    let expected: Vec<_> = [("none matmul", 0.5, 1.0)].into_iter().chain(adapted).collect();
    let expected = expected.into_iter().map(|(key, seconds, ratio)| (key.to_owned(), Some(seconds), Some(ratio)));
    assert_eq!(theirs, expected.collect::<Vec<_>>());

    let output = flora(with(&[]));
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    for expected in ["peer: the fake", "peer / flora", "2.00 s", "einsum"] {
        assert!(table.contains(expected), "`{expected}` is not in: {table}");
    }
    for (dtype, expected) in [("bf16", "refuses: no bf16 here"), ("f16", "doesn't know: \"what?")] {
        let output = flora(with(&["--dtype", dtype]));
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    }
}
