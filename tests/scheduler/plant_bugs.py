"""Makes a copy of the scheduler's sources into which bugs are built, to be switched on one by one.

    plant_bugs.py OUTPUT_DIR SOURCE...

Each bug is one or more edits: a piece of text that occurs exactly once in a file, and what to put in
its place, where BUG stands for "this bug is switched on". A piece that is not found fails the build:
whoever changes the scheduler changes the bug too. planted_bugs.h lists the names and holds the switch.
"""

import pathlib
import sys

BUGS = {
    "stale cache entry": [
        ("block_pool.cc", "  Unlink(block);\n  Forget(block);", "  Unlink(block);\n  if (!BUG) Forget(block);"),
        ("block_pool.cc", "block.num_references > 0 && block.content == kNoContent", "BUG || (block.num_references > 0 && block.content == kNoContent)"),
    ],
    "wrong slot": [
        ("schedule.cc", "plan.blocks.insert(plan.blocks.end(), blocks.begin(), blocks.end());",
         "plan.blocks.insert(plan.blocks.end(), blocks.begin(), blocks.end());\n"
         "    if (BUG && blocks.size() > 1) std::swap(plan.blocks.back(), plan.blocks[plan.blocks.size() - blocks.size()]);"),
    ],
    "preemption keeps num_computed_tokens": [
        ("sequence.cc", "  num_computed_tokens_ = 0;\n  last_content_ = kNoContent;",
         "  if (!BUG) num_computed_tokens_ = 0;\n  last_content_ = kNoContent;"),
    ],
    "the last token comes from the cache": [
        ("sequence.cc", "(hit.num_blocks + 1) * block_size_ < num_tokens()", "(hit.num_blocks + 1) * block_size_ < num_tokens() + BUG"),
        ("sequence.cc", "num_computed_tokens_ + block_size_ < num_tokens()", "num_computed_tokens_ + block_size_ < num_tokens() + BUG"),
    ],
    "a block is cached before it is full": [
        ("sequence.cc", "for (int32_t i = first; i < num_computed_tokens_ / block_size_; ++i) {",
         "for (int32_t i = first; i < (num_computed_tokens_ + (BUG && num_computed_tokens_ < this->num_tokens())) / block_size_; ++i) {"),
        ("block_pool.cc", "  block.content = ++last_content_;", "  if (BUG && block.content != kNoContent) return block.content;\n  block.content = ++last_content_;"),
    ],
    "the hash is not chained, nor the block before compared": [
        ("sequence.cc", "hashes_.empty() ? salt_hash_ : hashes_.back()", "hashes_.empty() || BUG ? salt_hash_ : hashes_.back()"),
        ("block_pool.cc", "block.previous == content.previous &&", "(BUG || block.previous == content.previous) &&"),
    ],
    "the block before is not compared": [
        ("block_pool.cc", "block.previous == content.previous) &&", "block.previous == content.previous || BUG) &&"),
    ],
    "the tokens are not compared": [
        ("block_pool.cc", "TokensOf(id) == content.tokens;", "(BUG || TokensOf(id) == content.tokens);"),
    ],
    "the salt is ignored": [
        ("sequence.cc", "salt_hash_(HashSalt(request_.cache_salt))", "salt_hash_(HashSalt(BUG ? std::string() : request_.cache_salt))"),
        ("block_pool.cc", "block.salt == content.salt &&", "(BUG || block.salt == content.salt) &&"),
    ],
    "the salt is not compared": [
        ("block_pool.cc", "block.salt == content.salt) &&", "block.salt == content.salt || BUG) &&"),
    ],
    "a cancelled sequence keeps its blocks": [
        ("scheduler.cc", "    Forget({&sequence, 1});", "    if (BUG) static_cast<void>(new Sequence(std::move(*sequence)));\n    Forget({&sequence, 1});"),
    ],
    "a cancelled sequence still gets its token": [
        ("scheduler.cc", "if (sequence->cancelled) {\n      ended.push_back(sequence);\n    } else if (drew)", "if (sequence->cancelled && !BUG) {\n      ended.push_back(sequence);\n    } else if (drew)"),
    ],
    "a hit stays in the free list": [
        ("block_pool.cc", "if (blocks_[block].num_references == 0) Unlink(block);", "if (blocks_[block].num_references == 0 && !BUG) Unlink(block);"),
    ],
    "a block with references goes to the free list": [
        ("block_pool.cc", "    if (block.num_references > 0) continue;", "    if (block.num_references > 0 && !BUG) continue;"),
    ],
    "a hit adds no reference": [
        ("block_pool.cc", "  Count(&blocks_[block], 1, background);\n}\n\nvoid",
         "  if (!BUG || blocks_[block].num_references == 0) Count(&blocks_[block], 1, background);\n}\n\nvoid"),
    ],
    "the end of a chunk is taken for the end of the prompt": [
        ("schedule.cc", "const bool sample = num_computed + num_tokens == sequence->num_tokens();", "const bool sample = BUG || num_computed + num_tokens == sequence->num_tokens();"),
        ("scheduler.cc", "const bool drew = sequence->num_computed_tokens() == sequence->num_tokens();", "const bool drew = BUG || sequence->num_computed_tokens() == sequence->num_tokens();"),
    ],
    "the plan names another dp_rank": [
        ("schedule.cc", ".dp_rank = sequence->dp_rank(),", ".dp_rank = BUG ? 0 : sequence->dp_rank(),"),
    ],
    "the prefix is taken from another rank's pool": [
        ("schedule.cc", "sequence->TakePrefix(&ranks_[rank].pool, rank);", "sequence->TakePrefix(&ranks_[BUG ? 0 : rank].pool, rank);"),
    ],
    "tokens go to the wrong sequence": [
        ("scheduler.cc", "const TokenId token = drew ? *sampled++ : 0;", "const TokenId token = drew ? (BUG ? result.sampled.back() : *sampled++) : 0;"),
    ],
    "a preempted sequence stays in the plan": [
        ("schedule.cc", "    shares_.erase(share);", "    if (!BUG) shares_.erase(share);"),
    ],
    "the budget is not charged": [
        ("schedule.cc", "  rank.budget -= num_tokens;", "  if (!BUG) rank.budget -= num_tokens;"),
    ],
    "max_running is not kept": [
        ("schedule.cc", "rank.num_background) >= max_running_) continue;", "rank.num_background) >= max_running_ + BUG) continue;"),
        ("schedule.cc", "if (ranks_[rank].num_running >= max_running_) Preempt", "if (ranks_[rank].num_running >= max_running_ + BUG) Preempt"),
        ("scheduler.cc", "LATENTD_CHECK(num_running[rank] <= max_running_);", "LATENTD_CHECK(num_running[rank] <= max_running_ + BUG);"),
    ],
    "the wait is first come, first served": [
        ("scheduler.cc", "return {sequence.background(), -static_cast<int64_t>(sequence.priority()), sequence.arrival()};",
         "return {sequence.background(), BUG ? 0 : -static_cast<int64_t>(sequence.priority()), sequence.arrival()};"),
    ],
    "stop tokens are not suppressed": [
        ("schedule.cc", "const bool suppress = sample &&", "const bool suppress = !BUG && sample &&"),
    ],
    "stop tokens are suppressed one token too long": [
        ("schedule.cc", "sequence->num_new_tokens() < request.min_new_tokens", "sequence->num_new_tokens() < request.min_new_tokens + BUG"),
    ],
    "max_new_tokens is one off": [
        ("scheduler.cc", "sequence.num_new_tokens() == sequence.request().max_new_tokens", "sequence.num_new_tokens() == sequence.request().max_new_tokens + BUG"),
        ("sequence.cc", "num_new_tokens() < request_.max_new_tokens", "num_new_tokens() < request_.max_new_tokens + BUG"),
    ],
    "a failed step keeps the cache": [
        ("scheduler.cc", "for (Rank& rank : ranks_) rank.pool.DropCache();", "if (!BUG) for (Rank& rank : ranks_) rank.pool.DropCache();"),
    ],
    "a failed step lets the unplanned go on": [
        ("scheduler.cc", "  Forget(ended);\n  SuspendAll();\n  return events;", "  Forget(ended);\n  if (!BUG) SuspendAll();\n  return events;"),
    ],
    "a lost step lets its sequences go on": [
        ("scheduler.cc", "  num_recovered_ += num_running();\n  SuspendAll();", "  num_recovered_ += num_running();\n  if (!BUG) SuspendAll();"),
    ],
    "a lost step is not counted": [
        ("scheduler.cc", "(sequence->num_lost += loss) > config_.max_recoveries", "(BUG ? 0 : sequence->num_lost += loss) > config_.max_recoveries"),
    ],
    "a lost step fails a request one recovery too early": [
        ("scheduler.cc", ": sequence->num_lost += loss) > config_.max_recoveries", ": sequence->num_lost += loss) + BUG > config_.max_recoveries"),
    ],
    "a request that was cancelled in a lost step goes on": [
        ("scheduler.cc", "    if (sequence->cancelled) {\n      ended.push_back(sequence);\n    } else if ((", "    if (sequence->cancelled && !BUG) {\n      ended.push_back(sequence);\n    } else if (("),
    ],
    "a lost step draws its tokens": [
        ("scheduler.cc", "  for (const Share& share : shares_) share.sequence->scheduled = false;",
         "  for (const Share& share : shares_) {\n    share.sequence->scheduled = false;\n"
         "    if (BUG && share.sequence->num_new_tokens() + 1 < share.sequence->request().max_new_tokens) share.sequence->AppendToken(0);\n  }"),
    ],
    "a preempted sequence's tokens go to another rank's budget": [
        ("schedule.cc", "    rank.budget += share->num_tokens;", "    (BUG ? ranks_.front() : rank).budget += share->num_tokens;"),
    ],
    "the ranks share one budget": [
        ("schedule.cc", "const int32_t budget = ranks_[sequence->dp_rank()].budget;", "const int32_t budget = (BUG ? ranks_.front() : ranks_[sequence->dp_rank()]).budget;"),
    ],
    "a spent rank stops the others": [
        ("schedule.cc", "    if (budget == 0) continue;", "    if (budget == 0 && BUG) break;\n    if (budget == 0) continue;"),
    ],
    "a sequence goes to the first rank that takes it": [
        ("schedule.cc", "if (best == nullptr || choice.work < best->work ||", "if (best == nullptr || (choice.work < best->work && !BUG) ||"),
        ("schedule.cc", "(choice.work == best->work && choice.room > best->room)) {", "(choice.work == best->work && choice.room > best->room && !BUG)) {"),
        ("schedule.cc", "if (choice.room < most_room - most_room / kRoomShare) continue;", "if (choice.room < most_room - most_room / kRoomShare && !BUG) continue;"),
    ],
    "a sequence goes where it has least to wait, room or not": [
        ("schedule.cc", "most_room - most_room / kRoomShare && !", "most_room - most_room / kRoomShare && !BUG && !"),
    ],
    "of ranks with equal room the busiest is taken": [
        ("schedule.cc", "(choice.work < best->work && !", "((BUG ? choice.work > best->work : choice.work < best->work) && !"),
    ],
    "the first in line waits for a rank that is spent": [
        ("schedule.cc", "if (rank.budget == 0 || rank.preempted[false]) continue;", "if ((rank.budget == 0 && !BUG) || rank.preempted[false]) continue;"),
        ("schedule.cc", "    const int32_t rank = ChooseRank(sequence);\n    if (rank < 0) return;", "    const int32_t rank = ChooseRank(sequence);\n    if (rank < 0 || (BUG && ranks_[rank].budget == 0)) return;"),
    ],
    "admission counts the free blocks of a hit twice": [
        ("schedule.cc", "if (num_to_compute + hit.num_available_blocks + num_spared > num_free) continue;",
         "if (num_to_compute + (BUG ? 0 : hit.num_available_blocks) + num_spared > num_free) continue;"),
    ],
    "the others wait for what background sequences hold": [
        ("schedule.cc", "rank.pool.num_free() + (background ? 0 : rank.pool.num_background())", "rank.pool.num_free() + (background || BUG ? 0 : rank.pool.num_background())"),
    ],
    "the others wait for the seats of background sequences": [
        ("schedule.cc", "(background ? 0 : rank.num_background) >= ", "(background || BUG ? 0 : rank.num_background) >= "),
    ],
    "another is preempted where a background sequence could be": [
        ("schedule.cc", "sequence->background() > victim->background() ||", "(sequence->background() > victim->background() && !BUG) ||"),
    ],
    "background tokens are not capped": [
        ("schedule.cc", "if (config_.max_background_tokens == 0 ||", "if (BUG || config_.max_background_tokens == 0 ||"),
    ],
    "background tokens are capped when nothing else runs": [
        ("schedule.cc", "config_.max_background_tokens == 0 || shares_.empty())", "config_.max_background_tokens == 0 || (shares_.empty() && !BUG))"),
    ],
    "background sequences are admitted into the blocks that the running ones need next": [
        ("schedule.cc", "const int32_t num_spared = background ?", "const int32_t num_spared = background && !BUG ?"),
    ],
    "background requests count in the others' max_waiting": [
        ("scheduler.cc", "int32_t& num_not_started = num_not_started_[request.background];", "int32_t& num_not_started = num_not_started_[request.background && !BUG];"),
    ],
    "background requests wait behind others that cannot run": [
        ("schedule.cc", "const auto next = waiting_.lower_bound({background, kFirst, kFirst});", "const auto next = waiting_.lower_bound({background && !BUG, kFirst, kFirst});"),
    ],
    "background sequences run first": [
        ("schedule.cc", "  ContinueRunning(/*background=*/false);\n  AdmitWaiting(/*background=*/false);\n",
         "  if (BUG) ContinueRunning(/*background=*/true);\n  ContinueRunning(/*background=*/false);\n  AdmitWaiting(/*background=*/false);\n"),
        ("schedule.cc", "  ContinueRunning(/*background=*/true);\n  AdmitWaiting(/*background=*/true);\n", "  if (!BUG) ContinueRunning(/*background=*/true);\n  AdmitWaiting(/*background=*/true);\n"),
    ],
}


def main() -> None:
    output, sources = pathlib.Path(sys.argv[1]), [pathlib.Path(p) for p in sys.argv[2:]]
    folder = output / "scheduler"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {source.name: source.read_text() for source in sources}
    for number, (name, edits) in enumerate(BUGS.items()):
        for file, old, new in edits:
            if texts[file].count(old) != 1:
                sys.exit(f"{file}: {texts[file].count(old)} places for the bug '{name}', 1 expected:\n{old}")
            texts[file] = texts[file].replace(old, new.replace("BUG", f"(planted_bug == {number})"))
    for name, text in texts.items():
        (folder / name).write_text('#include "planted_bugs.h"\n' + text)
    names = "".join(f'    "{name}",\n' for name in BUGS)
    (output / "planted_bugs.h").write_text(
        "#ifndef LATENTD_PLANTED_BUGS_H_\n#define LATENTD_PLANTED_BUGS_H_\n\nnamespace latentd {\n\n"
        f"inline constexpr const char* kPlantedBugs[] = {{\n{names}}};\n"
        "inline int planted_bug = -1;  // the one that is switched on; -1: none\n\n"
        "}  // namespace latentd\n\n#endif  // LATENTD_PLANTED_BUGS_H_\n")


if __name__ == "__main__":
    main()
