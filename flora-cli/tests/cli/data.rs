//! Other people's data: a model, adapters, a batch and inputs from files, against dense weights in f64.

use flora_checkpoint::read_matrices;

use super::command::answer;
use super::world::World;

const BATCH: [(Option<&str>, usize); 9] = [
    (Some("a-lora"), 3),
    (None, 2),
    (Some("c-hira"), 1),
    (Some("d-ia3"), 4),
    (Some("b-dora"), 2),
    (Some("e-flora"), 3),
    (Some("a-lora"), 1),
    (None, 0),
    (Some("e-flora"), 20),
];

#[test]
fn outputs_are_those_of_the_dense_weights() {
    let mut world = World::new();
    let segments: Vec<_> =
        BATCH.iter().map(|(adapter, rows)| serde_json::json!({ "adapter": adapter, "rows": rows })).collect();
    let batch = world.write("batch.json", &serde_json::Value::from(segments).to_string());
    let rows: usize = BATCH.iter().map(|(_, rows)| rows).sum();
    let inputs = world.write_inputs("x.safetensors", rows);
    let (x, y) = (world.path("x.safetensors"), world.path("y.safetensors"));
    let text = |path: &std::path::Path| path.to_string_lossy().into_owned();
    let more = ["--batch", &text(&batch), "--inputs", &text(&x), "--outputs", &text(&y), "--json"];
    let report = answer(world.run(&more));
    assert_eq!(report["rows"], rows);
    assert_eq!(report["segments"], BATCH.len());
    assert_eq!(report["adapters"], serde_json::json!({ "lora": 1, "dora": 1, "hira": 1, "ia3": 1, "flora": 1 }));
    assert_eq!(report["layers"].as_array().map(Vec::len), Some(6));

    let outputs = read_matrices(&y).expect("a safetensors file");
    assert_eq!(outputs.len(), world.modules.len());
    for module in &world.modules {
        let (x, y) = (&inputs[&module.path], &outputs[&module.path]);
        assert_eq!((y.rows, y.columns), (rows, module.k));
        let mut row = 0;
        for (adapter, count) in BATCH {
            let weight = module.weight_for(adapter);
            for row in row..row + count {
                let x = &x.values[row * module.d..][..module.d];
                for column in 0..module.k {
                    let products = weight[column * module.d..][..module.d].iter().zip(x);
                    let bias = module.bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]));
                    let expected: f64 = products.map(|(weight, x)| weight * f64::from(*x)).sum::<f64>() + bias;
                    let found = f64::from(y.values[row * module.k + column]);
                    // Sums of at most 12 products of numbers up to about 10, each rounded by 6e-8 of its size: below 1e-5.
                    let error = (found - expected).abs();
                    assert!(
                        error < 1e-5,
                        "{} {adapter:?} row {row} column {column}: {found} for {expected}",
                        module.path
                    );
                }
            }
            row += count;
        }
    }
}

#[test]
fn a_batch_may_be_empty_or_all_base() {
    let world = World::new();
    for (text, rows) in
        [("[]", 0), (r#"[{"adapter": null, "rows": 3}]"#, 3), (r#"[{"adapter": "a-lora", "rows": 0}]"#, 0)]
    {
        let batch = world.write("batch.json", text).to_string_lossy().into_owned();
        let report = answer(world.run(&["--batch", &batch, "--json"]));
        assert_eq!(report["rows"], rows, "{text}");
        assert_eq!(report["right"], true, "{text}");
    }
}
