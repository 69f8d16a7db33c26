//! Properties of the store, on random operations: it is a map, whatever happens to its process, and its queries are filters.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use crate::durable::Durable;
use crate::kv::{KeyValue, MemoryKv, WriteBatch};
use crate::simulation::world::{Fault, SimulatedIndex, World};
use crate::{Preference, Prompt, Query, Store};

#[derive(Debug, Clone)]
enum Operation {
    /// Puts or removes several keys at once.
    Write(Vec<(u8, Option<usize>)>),
    Reopen,
    Kill,
    PowerCut,
}

fn operation() -> impl Strategy<Value = Operation> {
    // Some values are large, so that the journal is folded now and then.
    let len = prop_oneof![4 => 0usize..40, 1 => (1usize << 20)..(3 << 20)];
    let write = (0u8..12, proptest::option::weighted(0.8, len));
    prop_oneof![
        8 => proptest::collection::vec(write, 0..4).prop_map(Operation::Write),
        1 => Just(Operation::Reopen),
        1 => Just(Operation::Kill),
        1 => Just(Operation::PowerCut),
    ]
}

fn open(world: &World) -> Durable {
    let index = Box::new(SimulatedIndex(world.clone()));
    Durable::open(Path::new("/job"), Arc::new(world.clone()), index, world.boot()).unwrap()
}

fn content(map: &Durable) -> BTreeMap<Vec<u8>, Vec<u8>> {
    map.scan(b"").unwrap().map(Result::unwrap).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_store_is_a_map(seed in any::<u64>(), operations in proptest::collection::vec(operation(), 0..40)) {
        let world = World::new(seed);
        let mut map = open(&world);
        let mut model = BTreeMap::new();
        for operation in operations {
            match operation {
                Operation::Write(writes) => {
                    let mut batch = WriteBatch::default();
                    for (key, len) in writes {
                        let key = vec![key % 3, key];
                        match len {
                            Some(len) => {
                                batch.put(key.clone(), vec![key[1]; len]);
                                model.insert(key.clone(), vec![key[1]; len]);
                            }
                            None => {
                                batch.remove(key.clone());
                                model.remove(&key);
                            }
                        }
                    }
                    map.apply(batch).unwrap();
                }
                Operation::Reopen => {
                    drop(map);
                    map = open(&world);
                }
                Operation::Kill | Operation::PowerCut => {
                    let fault = if matches!(operation, Operation::Kill) { Fault::Kill } else { Fault::Power };
                    world.inject(world.operations() + 1, fault);
                    let mut batch = WriteBatch::default();
                    batch.put(b"lost".to_vec(), vec![]);
                    prop_assert!(map.apply(batch).is_err());
                    drop(map);
                    world.restart();
                    map = open(&world);
                    // A write that was cut off may be there as a whole.
                    let mut batch = WriteBatch::default();
                    batch.remove(b"lost".to_vec());
                    map.apply(batch).unwrap();
                }
            }
            prop_assert_eq!(&content(&map), &model);
            for prefix in 0u8..3 {
                let found: Vec<_> = map.scan(&[prefix]).unwrap().map(|entry| entry.unwrap().0).collect();
                let wanted: Vec<_> = model.keys().filter(|key| key[0] == prefix).cloned().collect();
                prop_assert_eq!(found, wanted);
            }
        }
    }
}

fn preference() -> impl Strategy<Value = Preference> {
    let scores = proptest::collection::vec(-2.0f64..2.0, 2);
    (0u64..6, 0u32..3, 0u8..3, 0u8..3, scores).prop_map(|(step, index, prompt, judge, scores)| Preference {
        step,
        index,
        prompt: Prompt::Text(format!("question {prompt}")),
        completions: vec!["a".into(), format!("Answer {step}")],
        scores,
        judge: format!("judge {judge}"),
        ..Preference::default()
    })
}

fn query() -> impl Strategy<Value = Query> {
    let steps = proptest::option::of((0u64..6, 0u64..6).prop_map(|(a, b)| a.min(b)..a.max(b)));
    let number = || proptest::option::of(0u8..4);
    let after = proptest::option::of((0u64..6, 0u32..3));
    (steps, number(), number(), 0.0f64..0.8, number(), after).prop_map(
        |(steps, prompt, judge, disagreement_min, text, after)| Query {
            steps,
            prompt: prompt.map(|n| Prompt::Text(format!("question {n}"))),
            judge: judge.map(|n| format!("judge {n}")),
            disagreement_min,
            text: text.map(|n| format!("aNSWER {n}")),
            after,
        },
    )
}

proptest! {
    #[test]
    fn a_query_of_the_ledger_is_a_filter(
        batches in proptest::collection::vec(proptest::collection::vec(preference(), 0..4), 0..8),
        query in query(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut store =
            Store::assemble(Box::<MemoryKv>::default(), folder.path(), Arc::new(crate::Disk), None).unwrap();
        let mut model = BTreeMap::new();
        for batch in batches {
            store.log_preferences(&batch).unwrap();
            model.extend(batch.into_iter().map(|p| ((p.step, p.index), p)));
        }
        let all: Vec<Preference> = store.preferences().unwrap().map(Result::unwrap).collect();
        prop_assert_eq!(&all, &model.values().cloned().collect::<Vec<_>>());
        let found: Vec<Preference> = store.query(query.clone()).unwrap().map(Result::unwrap).collect();
        let wanted = |p: &&Preference| {
            query.steps.as_ref().is_none_or(|steps| steps.contains(&p.step))
                && query.prompt.as_ref().is_none_or(|prompt| *prompt == p.prompt)
                && query.judge.as_ref().is_none_or(|judge| *judge == p.judge)
                && p.disagreement() >= query.disagreement_min
                && query.text.as_ref().is_none_or(|text| text.ends_with(&p.step.to_string()))
                && query.after.is_none_or(|after| (p.step, p.index) > after)
        };
        let wanted: Vec<Preference> = model.values().filter(wanted).cloned().collect();
        prop_assert_eq!(found, wanted);
    }
}
