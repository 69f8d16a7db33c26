//! An algorithm of one's own: best-of-n distillation. The policy completes each prompt n times and is fine-tuned on the
//! completion with the best score. The job resumes to the bit, as the built-in ones do: stop it by any means and start it
//! again.
//!
//!     cargo run --example own_algorithm [DIRECTORY]

use rehearsal::actors::{Demonstrations, MaskedSequence};
use rehearsal::algorithms::OnlineSettings;
use rehearsal::learn::{NllReduction, pairs::Pair};
use rehearsal::rewards::RuleSource;
use rehearsal::{
    Algorithm, AlgorithmSettings, Algorithms, BoxFuture, Common, Evaluation, Event, Job, Keys, LoadedAlgorithm, Loader,
    Range, Result, RolloutInputs, Rollouts, Run, Seconds, Settings, Starter, Step, Updates, rollout_stats,
};

/// Settings of `best_of_n`: `[prompts]`, `[rollout]`, `[best_of_n]`.
#[derive(Debug, Clone)]
struct BestOfN {
    online: OnlineSettings,
    /// A prompt whose best completion scores less is left out.
    score_min: f64,
}

impl Default for BestOfN {
    fn default() -> Self {
        Self { online: OnlineSettings::default(), score_min: 0.0 }
    }
}

impl Settings for BestOfN {
    fn visit(&mut self, keys: &mut Keys) {
        self.online.visit(keys);
        let help = "A prompt whose best completion scores less is left out.";
        keys.section("best_of_n").number("score_min", &mut self.score_min, Range::any(), help);
    }
}

impl AlgorithmSettings for BestOfN {
    fn check(&self, common: &Common, keys: &mut Keys) {
        self.online.rollout.check(common, keys);
        self.online.rollout.check_compared(keys, "`best_of_n` needs");
    }

    fn needs_reward(&self) -> bool {
        true
    }

    fn load(&self, loader: &mut Loader<'_>) -> Result<Box<dyn LoadedAlgorithm>> {
        let inputs = self.online.load(loader, false)?;
        loader.rewards()?;
        Ok(Box::new(Loaded { settings: self.clone(), inputs }))
    }
}

struct Loaded {
    settings: BestOfN,
    inputs: RolloutInputs,
}

impl LoadedAlgorithm for Loaded {
    fn start<'a>(self: Box<Self>, starter: &'a mut Starter<'_>) -> BoxFuture<'a, Result<Box<dyn Algorithm>>> {
        Box::pin(async move {
            let rollouts = Rollouts::start(self.inputs, starter).await?;
            Ok(Box::new(Running { settings: self.settings, rollouts }) as _)
        })
    }
}

struct Running {
    settings: BestOfN,
    rollouts: Rollouts,
}

impl Algorithm for Running {
    fn step<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Step>> {
        Box::pin(async move {
            let mut seconds = Seconds::default();
            let (version, learning_rate) = (run.version(), run.learning_rate());
            let prompts = self.rollouts.draw(run);
            let groups = self.rollouts.collect(run, &prompts, &mut seconds).await?;

            // The best of each prompt's completions; the ledger keeps it as chosen over the worst.
            let (mut pairs, mut sequences) = (Vec::new(), Vec::new());
            for group in &groups {
                let score = |i: &usize| group.completions[*i].judged.score;
                let by_score = |a: &usize, b: &usize| score(a).total_cmp(&score(b));
                let places = 0..group.completions.len();
                let pair = places.clone().max_by(by_score).zip(places.min_by(by_score));
                let pair =
                    pair.map(|(chosen, rejected)| Pair { chosen, rejected, margin: score(&chosen) - score(&rejected) });
                if let Some(best) = pair.filter(|best| score(&best.chosen) >= self.settings.score_min) {
                    let prompt = &prompts[group.prompt as usize].tokens;
                    let completion = &group.completions[best.chosen].completion.tokens;
                    let loss_mask = [vec![false; prompt.len()], vec![true; completion.len()]].concat().into();
                    let tokens = [prompt.as_slice(), completion].concat().into();
                    sequences.push(MaskedSequence { tokens, loss_mask });
                }
                pairs.push(pair.filter(|pair| pair.margin > 0.0));
            }
            self.rollouts.log_preferences(run, &prompts, &groups, pairs).await?;

            let mut updates = Updates::default();
            if !sequences.is_empty() {
                let objective = Demonstrations { sequences, reduction: NllReduction::TokenMean };
                updates.add(run.learn(objective, learning_rate, 1.0).await?);
            }
            let summary = updates.summary(rollout_stats(&groups), seconds, learning_rate, version);
            Ok(self.settings.online.step(summary, &groups, prompts.len()))
        })
    }

    fn evaluate<'a>(&'a mut self, run: &'a mut Run) -> BoxFuture<'a, Result<Option<Evaluation>>> {
        Box::pin(self.rollouts.evaluate(run))
    }
}

#[tokio::main]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let directory = std::env::args().nth(1).unwrap_or_else(|| "runs/own_algorithm".into());
    let algorithms = Algorithms::default().with("best_of_n", || Box::new(BestOfN::default()));
    let mut config = algorithms.config("best_of_n", directory)?;
    config.common.job.steps = 30;
    config.common.optimizer.learning_rate = 3e-4;
    config.common.checkpoint.every_steps = 5;
    config.algorithm_as_mut::<BestOfN>().expect("as named above").online.rollout.completions_per_prompt = 4;
    config.reward::<RuleSource>().expect("a source of every configuration").rules = vec!["distinct_words".into()];
    let job = Job::builder(config).start_or_resume().await?;
    let mut events = job.events();
    while let Ok(event) = events.recv().await {
        match event {
            Event::Step(step) => {
                println!("step {:2}  reward {:.3}", step.step, step.stat("reward").unwrap_or_default())
            }
            Event::Finished(_) | Event::Failed { .. } => break,
            _ => {}
        }
    }
    println!("{} steps done", job.wait().await?.step);
    Ok(())
}
