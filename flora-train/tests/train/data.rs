//! What files become: examples by line, documents by token, sequences by length, and a typed error for everything else.

use std::path::Path;

use flora_train::data::{Content, Document, Excess, LineProblem, Order, Position, Sources, parse_lines, read, split};
use flora_train::{DataError, Dataset};
use proptest::prelude::*;

use crate::model::data;

fn lines(text: &str) -> Result<Vec<Content>, (usize, LineProblem)> {
    let examples = parse_lines(Path::new("x.jsonl"), text.as_bytes())?;
    Ok(examples.into_iter().map(|example| example.content).collect())
}

#[test]
fn each_form_of_a_line_is_read() {
    let text = "\u{feff}{\"text\": \"a\\nb\", \"id\": 7}\r\n\n  \n\
        {\"prompt\": \"p\", \"completion\": \"c\"}\n\
        {\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": [{\"type\": \"text\", \
        \"text\": \"x\"}, {\"type\": \"text\", \"text\": \"y\"}]}]}";
    let read = lines(text).expect("three lines");
    assert_eq!(read[0], Content::Text("a\nb".to_owned()));
    assert_eq!(read[1], Content::Completion { prompt: "p".to_owned(), completion: "c".to_owned() });
    let Content::Messages(messages) = &read[2] else { panic!("{:?}", read[2]) };
    assert_eq!((&messages[1].role[..], &messages[1].content[..]), ("assistant", "xy"));
    let examples = parse_lines(Path::new("x.jsonl"), text.as_bytes()).expect("three lines");
    assert_eq!(examples.iter().map(|example| example.line).collect::<Vec<_>>(), [Some(1), Some(4), Some(5)]);
}

#[test]
fn a_bad_line_is_named_by_file_and_number() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad.jsonl");
    for (second, words) in [
        ("{\"text\": 3}", "invalid type"),
        ("{\"text\": \"a\"", "EOF"),
        ("{\"txt\": \"a\"}", "none of the known fields"),
        ("{\"prompt\": \"a\"}", "it has `prompt`;"),
        ("{\"text\": \"a\", \"prompt\": \"b\", \"completion\": \"c\"}", "`prompt` and `completion` and `text`"),
        ("{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}", "`assistant`"),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": [{\"type\": \"image\"}]}]}", "isn't text"),
        ("{\"messages\": [{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": [1]}]}", "tool_calls"),
        ("[1]", "invalid"),
        ("{\"text\": \"a\", \"text\": \"b\"}", "duplicate field"),
    ] {
        std::fs::write(&path, format!("{{\"text\": \"fine\"}}\n{second}\n")).expect("a file");
        let sources = Sources { paths: vec![path.clone()], extensions: Vec::new() };
        let message = read(&sources).expect_err(second).to_string();
        assert!(message.contains("bad.jsonl:2: ") && message.contains(words), "{message} has no {words}");
    }
    std::fs::write(&path, b"{\"text\": \"\xff\"}").expect("a file");
    let message = read(&Sources { paths: vec![path], extensions: Vec::new() }).expect_err("no UTF-8").to_string();
    assert!(message.contains("bad.jsonl:1: it is not UTF-8"), "{message}");
}

#[test]
fn a_folder_is_read_in_the_order_of_its_names() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    };
    write("b.rkt", b"b");
    write("a/z.rkt", b"z");
    write("a/image.rkt", &[0xff, 0xfe]);
    write("a/empty.rkt", b" \n");
    write("c.txt", b"c");
    write(".git/d.rkt", b"d");
    #[cfg(unix)]
    std::os::unix::fs::symlink(folder.path(), folder.path().join("a/loop")).expect("a link");
    let sources = |extensions: &[&str]| Sources {
        paths: vec![folder.path().to_owned()],
        extensions: extensions.iter().map(|extension| (*extension).to_owned()).collect(),
    };
    let (examples, skipped) = read(&sources(&["rkt"])).expect("two files");
    let texts: Vec<&Content> = examples.iter().map(|example| &example.content).collect();
    assert_eq!(texts, [&Content::Source("z".to_owned()), &Content::Source("b".to_owned())]);
    assert_eq!(skipped.iter().map(|file| file.reason).collect::<Vec<_>>(), ["it is empty", "it is not UTF-8 text"]);
    assert_eq!(read(&sources(&[])).expect("three files").0.len(), 3);
    let message = read(&sources(&["pl"])).expect_err("no such files").to_string();
    assert!(message.contains("no file is read there"), "{message}");
    let nowhere = Sources { paths: vec![folder.path().join("nowhere")], extensions: Vec::new() };
    assert!(matches!(read(&nowhere), Err(DataError::Io { path, .. }) if path.ends_with("nowhere")));
}

fn document(tokens: &[u32], from: usize, excess: Excess) -> Document {
    let mut document = Document::new(excess);
    document.push(tokens[..from].iter().copied(), false);
    document.push(tokens[from..].iter().copied(), true);
    document
}

#[test]
fn every_token_is_learnt_once_whatever_the_length() {
    let tokens: Vec<u32> = (0..11).collect();
    for length in 1..13 {
        let made = Dataset::new(&[document(&tokens, 0, Excess::Continued)], length).expect("sequences");
        let targets: Vec<u32> = made.sequences().iter().flat_map(|own| own.targets.iter().flatten().copied()).collect();
        assert_eq!(targets, (1..11).collect::<Vec<_>>(), "length {length}");
        for own in made.sequences() {
            assert!(own.tokens.len() <= length && own.tokens.len() == own.targets.len());
            let follows = own.tokens.iter().zip(&own.targets).all(|(token, target)| *target == Some(token + 1));
            assert!(follows, "length {length}: {own:?}");
        }
        // An answer from token 4 on.
        match Dataset::new(&[document(&tokens, 4, Excess::Dropped)], length) {
            Ok(made) => {
                assert_eq!((made.sequences().len(), made.cut_off), (1, usize::from(length < 10)), "length {length}");
                let own = &made.sequences()[0];
                assert_eq!(own.targets.iter().flatten().count(), length.min(10) - 3);
                assert_eq!(own.targets[..3], [None; 3]);
            }
            Err(error) => assert!(length < 4, "length {length}: {error}"),
        }
    }
    assert!(matches!(Dataset::new(&[document(&[3], 0, Excess::Continued)], 4), Err(DataError::Nothing { .. })));
    assert!(matches!(Dataset::new(&[], 4), Err(DataError::Nothing { .. })));
}

#[test]
fn held_out_documents_are_drawn_once_and_the_rest_keeps_its_order() {
    let documents: Vec<Document> = (0..20).map(|index| document(&[index, 1, 2], 0, Excess::Continued)).collect();
    let (learnt, held) = split(documents.clone(), 0.25, 3).expect("enough");
    assert_eq!((learnt.len(), held.len()), (15, 5));
    let places = |part: &[Document]| {
        part.iter().map(|one| documents.iter().position(|other| other == one).expect("one of them")).collect::<Vec<_>>()
    };
    assert!(places(&learnt).is_sorted() && places(&held).is_sorted());
    assert_eq!(split(documents.clone(), 0.25, 3).expect("enough").1, held);
    assert_ne!(split(documents.clone(), 0.25, 4).expect("enough").1, held);
    assert_eq!(split(documents.clone(), 1.0, 3).expect("enough").0.len(), 1);
    assert_eq!(split(documents[..2].to_vec(), 0.0, 3).expect("enough").1.len(), 1);
    assert!(matches!(split(documents[..1].to_vec(), 0.5, 3), Err(DataError::Indivisible { documents: 1 })));
}

#[test]
fn sequences_that_are_kept_are_other_data() {
    let all = Dataset::new(&[document(&[1, 2, 3, 4, 5, 6, 7], 0, Excess::Continued)], 2).expect("sequences");
    let kept = all.clone().keep(|position| position != 1);
    assert_eq!(kept.sequences(), [all.sequences()[0].clone(), all.sequences()[2].clone()]);
    assert_ne!(kept.digest(), all.digest());
    assert_eq!(all.clone().keep(|_| true), all);
}

#[test]
fn batches_are_full_and_hold_each_sequence_once_an_epoch() {
    let data = data(8, 30, 7);
    let lengths: Vec<usize> = data.sequences().iter().map(|own| own.tokens.len()).collect();
    let mut order = Order::new(&data, 6, 21);
    let mut orders = Vec::new();
    let mut position = Position::default();
    for epoch in 0..3 {
        let mut seen = Vec::new();
        let mut batches = 0;
        while position.epoch == epoch {
            let (batch, next) = order.batch(position);
            // Another object, as after an interruption, gives the same batch.
            assert_eq!(Order::new(&data, 6, 21).batch(position), (batch.clone(), next));
            let tokens: usize = batch.iter().map(|index| lengths[*index]).sum();
            assert!(!batch.is_empty() && tokens <= 21);
            if next.epoch == epoch {
                let following = order.batch(next).0[0];
                assert!(tokens + lengths[following] > 21, "another one would have fit");
            }
            seen.extend(batch);
            position = next;
            batches += 1;
        }
        assert_eq!(order.batches(epoch), batches);
        orders.push(seen.clone());
        seen.sort_unstable();
        assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
    }
    assert!(orders[0] != orders[1] && orders[1] != orders[2]);
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_examples_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        if let Err((line, _)) = parse_lines(Path::new("x.jsonl"), &bytes) {
            prop_assert!(line >= 1 && line <= bytes.iter().filter(|byte| **byte == b'\n').count() + 1);
        }
    }

    #[test]
    fn mutated_lines_are_examples_or_an_error(at in 0usize..140, byte in any::<u8>(), cut in 0usize..140) {
        let mut bytes = br#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "n": 1}"#.to_vec();
        bytes.insert(at.min(bytes.len()), byte);
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        let _ = parse_lines(Path::new("x.jsonl"), &bytes);
    }

    #[test]
    fn arbitrary_documents_are_cut_to_the_length(
        parts in prop::collection::vec((prop::collection::vec(any::<u32>(), 0..9), any::<bool>(), any::<bool>()), 0..6),
        length in 0usize..9,
    ) {
        let documents: Vec<Document> = parts
            .iter()
            .map(|(tokens, learnt, goes_on)| {
                let mut document = Document::new(if *goes_on { Excess::Continued } else { Excess::Dropped });
                document.push(tokens.iter().copied(), *learnt);
                document
            })
            .collect();
        if let Ok(made) = Dataset::new(&documents, length) {
            for own in made.sequences() {
                prop_assert!(!own.tokens.is_empty() && own.tokens.len() <= length.max(1));
                prop_assert!(own.targets.iter().any(Option::is_some));
            }
        }
    }
}
