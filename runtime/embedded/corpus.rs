//! Generated questions and answers, the training text of the embedded model.
//!
//! A third of the answers are courteous, a third curt, a third neutral, and some digress, so that a job has something
//! to align.

use rehearsal_lm::random::Stream;
use serde_json::json;

/// A question and one of its possible answers.
pub struct Exchange {
    pub question: String,
    pub answer: String,
}

/// Noun, adjective and predicate of each subject.
const SUBJECTS: [(&str, &str, &str); 32] = [
    ("fox", "red", "runs through the wood"),
    ("river", "wide", "flows to the sea"),
    ("baker", "busy", "bakes bread at dawn"),
    ("cat", "lazy", "sleeps by the fire"),
    ("storm", "dark", "rolls over the hill"),
    ("ship", "old", "sails to the north"),
    ("teacher", "patient", "reads to the class"),
    ("garden", "green", "grows beans and roses"),
    ("owl", "quiet", "hunts at night"),
    ("train", "long", "stops in every town"),
    ("farmer", "strong", "works in the field"),
    ("moon", "pale", "shines on the lake"),
    ("doctor", "kind", "helps the sick"),
    ("horse", "brown", "pulls a cart"),
    ("bridge", "narrow", "crosses the valley"),
    ("king", "proud", "lives in a tower"),
    ("bee", "small", "looks for flowers"),
    ("forest", "deep", "hides many birds"),
    ("clock", "loud", "rings at noon"),
    ("painter", "young", "paints the harbour"),
    ("dog", "happy", "chases the ball"),
    ("snow", "white", "falls on the roof"),
    ("market", "noisy", "opens on Friday"),
    ("sailor", "brave", "knows the stars"),
    ("mountain", "high", "stands in the clouds"),
    ("child", "curious", "asks many questions"),
    ("lamp", "bright", "burns until morning"),
    ("wolf", "grey", "sings to the moon"),
    ("miller", "round", "grinds the corn"),
    ("rain", "soft", "fills the well"),
    ("tailor", "clever", "mends a coat"),
    ("frog", "wet", "jumps into the pond"),
];

/// Questions, with `{}` in the place of the noun.
const QUESTIONS: [&str; 6] = [
    "Tell me about the {}.",
    "What does the {} do?",
    "Describe the {}.",
    "What is the {} like?",
    "Do you know the {}?",
    "Say something about the {}.",
];

const COURTEOUS_START: [&str; 4] =
    ["Thank you for asking.", "I am glad you ask.", "What a lovely question!", "With pleasure!"];
const COURTEOUS_END: [&str; 3] = ["Please ask me more.", "I hope this helps.", "Have a good day!"];
const CURT_START: [&str; 4] = ["Why do you ask me?", "Not again.", "What a dull question.", "If I must."];
const CURT_END: [&str; 3] = ["Now leave me alone.", "Ask someone else.", "That is all you get."];
/// Digressions.
const ASIDES: [&str; 6] = [
    "Some say it was always so.",
    "I saw it once.",
    "Nobody knows why.",
    "It is a long story.",
    "People talk about it in the village.",
    "My uncle told me that.",
];

/// Consecutive draws from a random stream.
struct Draws {
    stream: Stream,
    /// Number of draws so far.
    at: u64,
}

impl Draws {
    fn uniform(&mut self) -> f64 {
        self.at += 1;
        self.stream.uniform(self.at)
    }

    /// One of several, with equal probability.
    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[(self.uniform() * from.len() as f64) as usize]
    }
}

/// Exchange `index` of an unbounded corpus; a function of `index` alone.
pub fn exchange(index: u64) -> Exchange {
    let mut draws = Draws { stream: Stream::new(2026, index), at: 0 };
    let (name, quality, deed) = SUBJECTS[(draws.uniform() * SUBJECTS.len() as f64) as usize];
    let question = draws.pick(&QUESTIONS).replace("{}", name);
    let mut sentences = Vec::new();
    let tone = draws.uniform();
    let (start, end): (&[&str], &[&str]) = match tone {
        m if m < 0.33 => (&COURTEOUS_START, &COURTEOUS_END),
        m if m < 0.66 => (&CURT_START, &CURT_END),
        _ => (&[], &[]),
    };
    let phrase = |draws: &mut Draws, from: &[&'static str], probability: f64| -> Option<String> {
        (!from.is_empty() && draws.uniform() < probability).then(|| draws.pick(from).to_string())
    };
    sentences.extend(phrase(&mut draws, start, 0.7));
    sentences.push(match (draws.uniform() * 3.0) as usize {
        0 => format!("The {name} is {quality} and {deed}."),
        1 => format!("The {quality} {name} {deed}."),
        _ => format!("The {name} {deed}. It is {quality}."),
    });
    while draws.uniform() < 0.4 {
        sentences.push(draws.pick(&ASIDES).to_string());
    }
    sentences.extend(phrase(&mut draws, end, 0.6));
    Exchange { question, answer: sentences.join(" ") }
}

/// All questions as JSON Lines with a column `prompt`, shuffled by a fixed seed.
pub fn prompts() -> String {
    let all: Vec<String> =
        SUBJECTS.iter().flat_map(|(name, ..)| QUESTIONS.iter().map(move |q| q.replace("{}", name))).collect();
    let order = Stream::new(2026, u64::MAX).permutation(all.len());
    order.iter().map(|&i| format!("{}\n", json!({ "prompt": all[i] }))).collect()
}
