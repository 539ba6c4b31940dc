"""Tests of the chat's commands, over a session that echoes."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_chat import EchoSession

from ktrt.chat.commands import (
    COMMANDS,
    Leave,
    completions,
    run_line,
)
from ktrt.chat.conversation import (
    Conversation,
    ConversationFile,
    new_autosave,
    read_conversation,
)
from ktrt.chat.dialog import Keeping, Talk, with_files
from ktrt.chat.terminal import Terminal
from ktrt.errors import ConfigError, KtrtError


class Chat:
    """Plays a person at a terminal, line by line."""

    def __init__(
        self,
        *adapters: str,
        context_limit: int = 10_000,
        interactive: bool = True,
        thinking: bool | None = None,
    ) -> None:
        self.session = EchoSession(*adapters, context_limit=context_limit)
        self.session.template.thinking = thinking
        self.stdout, self.stderr = io.StringIO(), io.StringIO()
        terminal = Terminal(io.BytesIO(), self.stdout, self.stderr, interactive=interactive)
        self.talk = Talk(self.session, terminal, Conversation())  # type: ignore[arg-type]

    def say(self, line: str) -> str:
        """Enters a line; returns the output without the status line."""
        self.stdout.seek(0)
        self.stdout.truncate()
        run_line(self.talk, line)
        lines = self.stdout.getvalue().splitlines()
        return "\n".join(each for each in lines if " · first after " not in each)

    @property
    def turns(self) -> list[str]:
        return [turn["content"] for turn in self.talk.conversation.turns]


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return Chat("persona", "pirate")


class TestLines:
    def test_leaving(self, chat: Chat) -> None:
        for line in ("exit", " exit ", "/exit"):
            with pytest.raises(Leave):
                chat.say(line)
        assert chat.say("exit now") == "Assistant: exit now exit now"

    def test_two_slashes_send_one(self, chat: Chat) -> None:
        assert chat.say("//etc is a folder") == "Assistant: /etc is a folder /etc is a folder"

    @pytest.mark.parametrize("line", ["", "  ", "\n"])
    def test_nothing_is_not_sent(self, chat: Chat, line: str) -> None:
        assert chat.say(line) == ""

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/retyr", "unknown command /retyr (did you mean 'retry'?); /help lists them"),
            ("/", "unknown command /; "),
            ("/ help", "unknown command /; "),
            ("/usr/bin/env is a file", "unknown command /usr/bin/env; "),
        ],
    )
    def test_unknown_commands(self, chat: Chat, line: str, message: str) -> None:
        with pytest.raises(KtrtError) as caught:
            chat.say(line)
        assert message in str(caught.value)
        assert "//" in str(caught.value)

    def test_help_names_every_command(self, chat: Chat) -> None:
        text = chat.say("/help")
        assert all(f"\n/{name}" in f"\n{text}" for name in COMMANDS)

    def test_pasted_lines_of_a_command_belong_to_it(self, chat: Chat) -> None:
        chat.say("/system one\ntwo")
        assert chat.talk.conversation.system == "one\ntwo"
        chat.say("/system\nthree")
        assert chat.talk.conversation.system == "three"


class TestHistory:
    def test_retry_replaces_the_answer(self, chat: Chat) -> None:
        chat.say("a")
        chat.say("history")
        assert chat.say("/retry") == "Assistant: user: a | assistant: a a"
        assert chat.turns == ["a", "a a", "history", "user: a | assistant: a a"]

    def test_retry_without_a_new_answer_keeps_the_old_one(self, chat: Chat) -> None:
        for name in ("fail", "silence", "bug"):
            chat.talk.conversation.turns = []
            chat.talk.conversation.add(name, "the old answer")
            if name == "silence":
                assert "nothing was kept" in chat.say("/retry")
            else:
                with pytest.raises((KtrtError, ZeroDivisionError)):
                    chat.say("/retry")
            assert chat.turns == [name, "the old answer"]
            assert chat.talk.conversation.unanswered is None

    def test_retry_keeps_the_old_answer_on_disk_meanwhile(self, chat: Chat) -> None:
        file = new_autosave()
        chat.talk.keeping = Keeping(autosave=file)
        chat.talk.conversation.add("a", "b")
        chat.talk.conversation.add("c", "the old answer")
        chat.talk.save()
        seen = []
        stream = chat.session.stream_responses

        def spy(messages: Any, **others: Any) -> Iterator[Any]:
            assert [each["content"] for each in messages] == ["a", "b", "c"]
            for response in stream(messages, **others):
                seen.append(read_conversation(file.path))
                yield response

        chat.session.stream_responses = spy  # type: ignore[method-assign]
        chat.say("/retry")
        assert [each.turns[-1]["content"] for each in seen] == ["the old answer"] * 4
        assert read_conversation(file.path).turns[-1]["content"] == "c c"
        assert chat.turns == ["a", "b", "c", "c c"]

    def test_retry_again_after_turns_were_left_out(self) -> None:
        chat = Chat(context_limit=200)
        chat.say("/set max_new_tokens 40")
        for number in range(6):
            chat.say(f"{number}" * 10)
        assert chat.say("/retry").startswith("Assistant: 5555555555 5555555555")
        assert len(chat.turns) == 12

    @pytest.mark.parametrize("name", [key for key, each in COMMANDS.items() if each.alone])
    def test_a_text_that_begins_with_a_command(self, chat: Chat, name: str) -> None:
        """It was probably pasted: nothing runs, and the text stays."""
        chat.say("a")
        with pytest.raises(KtrtError, match=f"/{name} stands alone, found 'and more' after it"):
            chat.say(f"/{name}\nand more")
        assert chat.turns == ["a", "a a"]

    def test_a_failed_message_waits(self, chat: Chat) -> None:
        chat.say("a")
        with pytest.raises(KtrtError, match="out of order"):
            chat.say("fail")
        assert chat.turns == ["a", "a a"]
        assert chat.talk.conversation.unanswered == "fail"
        with pytest.raises(KtrtError, match="out of order"):
            chat.say("/retry")
        assert chat.say("/undo") == "Removed: fail"
        assert chat.turns == ["a", "a a"]

    def test_undo(self, chat: Chat) -> None:
        chat.say("a")
        chat.say("b " * 50)
        assert chat.say("/undo") == f"Removed: {('b ' * 50)[:59]}…"
        assert chat.turns == ["a", "a a"]
        chat.say("/undo")
        with pytest.raises(KtrtError, match="nothing to take back"):
            chat.say("/undo")
        with pytest.raises(KtrtError, match="nothing was asked yet"):
            chat.say("/retry")

    def test_what_was_undone_stays_until_another_answer_is_complete(self, chat: Chat) -> None:
        """On disk, too."""
        file = new_autosave()
        chat.talk.keeping = Keeping(autosave=file)
        for text in ("a", "b"):
            chat.say(text)
        chat.say("/undo")
        chat.say("/undo")
        with pytest.raises(KtrtError, match="out of order"):
            chat.say("fail")
        kept = read_conversation(file.path)
        assert (kept.turns, kept.unanswered) == ([], "fail")
        assert [each["content"] for each in kept.undone] == ["a", "a a", "b", "b b"]
        chat.say("/undo")
        assert chat.say("/redo") == "Back again: a"
        assert read_conversation(file.path).turns == chat.talk.conversation.turns
        chat.say("/undo")
        assert chat.say("/redo") == "Back again: a"
        assert chat.say("/redo") == "Back again: b"
        assert chat.turns == ["a", "a a", "b", "b b"]
        chat.say("/undo")
        chat.say("c")
        assert chat.turns == ["a", "a a", "c", "c c"]
        assert "undone" not in file.path.read_text("utf-8")
        with pytest.raises(KtrtError, match="nothing was taken back"):
            chat.say("/redo")
        chat.say("/undo")
        chat.say("/retry")
        assert chat.talk.conversation.undone == []
        chat.say("/undo")
        chat.say("/clear")
        assert not file.path.exists()

    def test_clear_keeps_system_and_settings(self, chat: Chat) -> None:
        chat.say("/system s")
        chat.say("/set top_k 3")
        chat.say("a")
        assert chat.say("clear") == "History has been removed."
        assert chat.say("history") == "Assistant: system: s"
        assert chat.talk.sampling.top_k == 3

    def test_system(self, chat: Chat) -> None:
        assert chat.say("/system") == "System prompt: as configured"
        chat.say("/system Be brief.")
        assert chat.say("/system") == "System prompt: Be brief."
        assert chat.say("history") == "Assistant: system: Be brief."
        chat.say("/system default")
        chat.say("clear")
        assert chat.say("history").startswith("Assistant: \nThe answer is empty: nothing was kept.")

    def test_old_turns_are_left_out_with_a_notice(self) -> None:
        chat = Chat(context_limit=200)
        chat.say("/set max_new_tokens 40")
        for number in range(5):
            assert chat.say(f"{number}" * 10).startswith("Assistant")  # 31 tokens per turn
        assert "its 3 oldest turns are kept but not sent any more" in chat.say("x" * 10)
        assert len(chat.turns) == 12
        # There is room for the next one, which starts at the same turn.
        assert chat.say("history").startswith("Assistant: user: 3333333333 | ")
        chat.say("clear")
        assert "oldest" not in chat.say("a")

    def test_a_message_that_never_fits_is_an_error(self) -> None:
        chat = Chat(context_limit=200)
        assert chat.say("a") == "Assistant: a a"
        fitted = chat.talk.fitted("x" * 300)
        assert [len(each["content"]) for each in fitted] == [300]  # refused by the session


class TestSettings:
    def test_set_and_reset(self, chat: Chat) -> None:
        assert chat.say("/set temperature 0.5") == "temperature = 0.5  (set here)"
        assert chat.say("settings").startswith("Assistant: temperature 0.5 seed None")
        assert chat.say("/set temperature") == "temperature = 0.5  (set here)"
        assert chat.say("/set temperature=0.25") == "temperature = 0.25  (set here)"
        assert chat.say("/set temperature default") == "temperature = 0.95"
        assert chat.say("settings").startswith("Assistant: temperature 0.95 seed None")

    def test_the_list(self, chat: Chat) -> None:
        chat.say("/set seed 7")
        lines = chat.say("/set").splitlines()
        assert "seed = 7  (set here)" in lines
        assert "do_sample = true" in lines
        assert "top_k = 50" in lines

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/set temperatur 1", "did you mean 'temperature'?"),
            ("/set temperatur", "did you mean 'temperature'?"),
            ("/set temperatur default", "did you mean 'temperature'?"),
            ("/set temperature hot", "expected a number"),
            ("/set temperature -1", "temperature: expected 0 or more"),
            ("/set top_k [", "not valid YAML"),
        ],
    )
    def test_wrong_values_change_nothing(self, chat: Chat, line: str, message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            chat.say(line)
        assert message in str(caught.value)
        assert chat.talk.conversation.settings == {}

    def test_a_list_of_stop_strings(self, chat: Chat) -> None:
        chat.say("/set stop_strings ['a b', c]")
        assert chat.talk.sampling.stop_strings == ("a b", "c")

    def test_thinking(self, chat: Chat) -> None:
        assert chat.say("/think") == "Thinking: this template has no switch for it"
        with pytest.raises(ConfigError, match="cannot switch"):
            chat.say("/think on")
        assert chat.talk.conversation.thinking is None
        chat.session.template.thinking = True
        assert chat.say("/think off") == "Thinking: off"
        assert chat.talk.conversation.thinking is False
        with pytest.raises(KtrtError, match="expected on or off, found 'maybe'"):
            chat.say("/think maybe")

    def test_thinking_of_a_loaded_conversation(self, tmp_path: Path) -> None:
        chat = Chat(thinking=True)
        for thinking, expected in ((False, False), (None, True)):
            chat.talk.use(Conversation(thinking=thinking))
            assert chat.session.template.thinking is expected
        chat = Chat()
        chat.talk.use(Conversation(thinking=False))
        assert "no switch for thinking" in chat.stdout.getvalue()
        assert chat.talk.conversation.thinking is None

    def test_stats(self, chat: Chat) -> None:
        assert "answers           0" in chat.say("/stats")
        chat.say("a")
        shown = chat.say("/stats")
        assert "context           104 tokens" in shown
        assert "answers           1" in shown
        assert "conversation      1 turn" in shown


class TestFiles:
    def test_save_and_load(self, chat: Chat) -> None:
        chat.say("/set seed 7")
        chat.say("a")
        assert chat.say("/save told.json") == "Saved 1 turn in told.json"
        chat.say("b")
        assert chat.say("/load told.json") == "Loaded told.json: 1 turn"
        assert chat.turns == ["a", "a a"]
        assert chat.talk.sampling.seed == 7
        assert chat.say("/save").startswith("Saved 1 turn in conversation-2")

    def test_other_files_are_not_overwritten(self, chat: Chat, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("dear diary", "utf-8")
        with pytest.raises(KtrtError, match="not a saved conversation"):
            chat.say("/save notes.txt")
        assert (tmp_path / "notes.txt").read_text("utf-8") == "dear diary"

    def test_loading_what_does_not_suit_changes_nothing(self, chat: Chat, tmp_path: Path) -> None:
        chat.say("a")
        for settings in ('{"top_k": -1}', '{"nonsense": 1}'):
            (tmp_path / "c.json").write_text(
                f'{{"format": "ktrt conversation 1", "settings": {settings}}}', "utf-8"
            )
            with pytest.raises(ConfigError):
                chat.say("/load c.json")
        with pytest.raises(KtrtError, match="expected /load FILE"):
            chat.say("/load")
        assert chat.turns == ["a", "a a"]

    def test_loading_keeps_what_was_saved_before(self, chat: Chat) -> None:
        chat.talk.keeping = Keeping(autosave=new_autosave())
        chat.say("a")
        assert chat.talk.keeping.autosave is not None
        first = chat.talk.keeping.autosave.path
        chat.say("/save told.json")
        chat.say("b")
        chat.say("/load told.json")
        second = chat.talk.keeping.autosave.path
        assert (len(read_conversation(first).turns), len(read_conversation(second).turns)) == (4, 2)

    def test_loading_does_not_overwrite_what_is_saved(self, chat: Chat, tmp_path: Path) -> None:
        told, other = tmp_path / "told.json", tmp_path / "other.json"
        chat.talk.keeping = Keeping(save=ConversationFile(told))
        chat.say("a")
        chat.say("/save other.json")
        chat.say("b")
        chat.say("/load told.json")  # the same file is still saved
        chat.say("c")
        assert len(read_conversation(told).turns) == 6
        assert f"{told} keeps the conversation before" in chat.say("/load other.json")
        chat.say("x")
        assert len(read_conversation(told).turns) == 6
        assert len(read_conversation(other).turns) == 2
        assert chat.stderr.getvalue() == ""

    def test_saving_where_it_is_saved_anyway(self, chat: Chat, tmp_path: Path) -> None:
        chat.talk.keeping = Keeping(save=ConversationFile(tmp_path / "told.json"))
        chat.say("a")
        chat.say("/save told.json")
        chat.say("b")
        assert len(read_conversation(tmp_path / "told.json").turns) == 4
        assert chat.stderr.getvalue() == ""

    def test_a_file_goes_with_one_message(self, chat: Chat, tmp_path: Path) -> None:
        (tmp_path / "a b.py").write_text("x = '```'\n", "utf-8")
        assert chat.say("/file a b.py") == "a b.py: 10 characters go with the next message."
        assert chat.say("/file") == "Files for the next message: a b.py"
        chat.say("What is it?")
        assert chat.turns[0] == "a b.py:\n````\nx = '```'\n````\n\nWhat is it?"
        chat.say("And now?")
        assert chat.turns[2] == "And now?"
        chat.say("/file a b.py")
        assert chat.say("/file -") == "Files for the next message: none"

    def test_files_are_checked(self, chat: Chat, tmp_path: Path) -> None:
        (tmp_path / "big").write_bytes(b"x" * ((4 << 20) + 1))
        for name, message in (("big", "larger than"), ("none", "No such file"), (".", "directory")):
            with pytest.raises(KtrtError, match=message):
                chat.say(f"/file {name}")
        assert chat.talk.attachments == {}

    def test_several_files(self) -> None:
        assert (
            with_files("q", {"d/a": "1\n", "b": "2"}) == "a:\n```\n1\n```\n\nb:\n```\n2\n```\n\nq"
        )
        assert with_files("q", {}) == "q"

    def test_lines_from_a_pipe_name_no_files(self, tmp_path: Path) -> None:
        chat = Chat(interactive=False)
        for name in ("save", "load", "file"):
            with pytest.raises(KtrtError, match=f"/{name} works in a terminal only"):
                chat.say(f"/{name} {tmp_path / 'x'}")
        assert list(tmp_path.iterdir()) == []


class TestKeeping:
    def test_every_turn_is_saved(self, chat: Chat) -> None:
        file = new_autosave()
        chat.talk.keeping = Keeping("m", "a", autosave=file)
        chat.talk.use(Conversation())
        assert not file.path.exists()
        chat.say("a")
        assert read_conversation(file.path).turns[1]["content"] == "a a"
        assert (read_conversation(file.path).model, read_conversation(file.path).adapter) == (
            "m",
            "a",
        )
        with pytest.raises(KtrtError):
            chat.say("fail")
        assert read_conversation(file.path).unanswered == "fail"
        chat.say("/set seed 3")
        assert read_conversation(file.path).settings == {"seed": 3}
        chat.say("clear")
        assert not file.path.exists()

    def test_a_full_disk_is_reported_once(
        self, chat: Chat, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chat.talk.keeping = Keeping(autosave=new_autosave())

        def full(_: object, __: object) -> None:
            raise KtrtError("c.json: no space left")

        monkeypatch.setattr("ktrt.chat.conversation.write_conversation", full)
        assert chat.say("a") == "Assistant: a a"
        assert chat.say("b") == "Assistant: b b"
        assert chat.stderr.getvalue() == "error: c.json: no space left\n"
        assert len(chat.turns) == 4


class TestAdapters:
    def test_the_list(self, chat: Chat) -> None:
        assert chat.say("/adapter") == "* persona, weight 1\n  pirate"

    def test_switching(self, chat: Chat) -> None:
        assert chat.say("/adapter pirate") == "  persona\n* pirate, weight 1"
        assert chat.say("/adapter scale 0.5") == "  persona\n* pirate, weight 0.5"
        assert chat.say("/adapter off") == "  persona\n  pirate\nThe base model answers."
        assert chat.say("settings").endswith("from the base")
        chat.say("/adapter on")
        assert "from pirate 0.5" in chat.say("settings")
        chat.say("/adapter persona=0.75 pirate=0.25")
        assert chat.session.adapters.active == {"persona": 0.75, "pirate": 0.25}

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("/adapter nobody", "no adapter 'nobody'; resident: persona, pirate"),
            ("/adapter scale", "expected one number"),
            ("/adapter scale much", "expected a number, found 'much'"),
            ("/adapter persona=much", "expected a number, found 'much'"),
        ],
    )
    def test_mistakes(self, chat: Chat, line: str, message: str) -> None:
        with pytest.raises(KtrtError) as caught:
            chat.say(line)
        assert message in str(caught.value)
        assert chat.session.adapters.active == {"persona": 1.0}

    def test_without_adapters(self) -> None:
        for line in ("/adapter", "/compare a"):
            with pytest.raises(KtrtError, match="no adapter is loaded"):
                Chat().say(line)


class TestCompare:
    def test_side_by_side(self, chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "100")
        chat.say("/set seed 7")
        lines = chat.say("/compare settings").splitlines()
        assert [cell.strip() for cell in lines[1].strip("┃").split("┃")] == [
            "base model",
            "persona",
        ]
        cells = [cell.strip() for cell in lines[3].strip("│").split("│")]
        assert cells[0] == "temperature 0.95 seed 7 from the base"
        assert cells[1].startswith("temperature 0.95 seed 7 from persona")

    def test_one_after_the_other_where_it_is_narrow(
        self, chat: Chat, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        base, tuned = chat.say("/compare settings").splitlines()
        assert base.startswith("base model: temperature 0.95 seed ")
        assert tuned.startswith("persona: temperature 0.95 seed ")
        assert base.split()[5] == tuned.split()[4] != "None"

    def test_it_is_no_part_of_the_conversation(self, chat: Chat) -> None:
        chat.say("a")
        assert "user: a | assistant: a a" in chat.say("/compare history").replace("\n", "")
        assert chat.turns == ["a", "a a"]

    @pytest.mark.parametrize("active", [{"persona": 1.0}, {"pirate": 0.5}, {}])
    @pytest.mark.parametrize("prompt", ["a", "fail"])
    def test_the_adapter_stays_as_it_was(
        self, chat: Chat, active: dict[str, float], prompt: str
    ) -> None:
        if active:
            chat.session.adapters.activate(active)
        else:
            chat.session.adapters.off()
        if prompt == "fail":
            with pytest.raises(KtrtError, match="out of order"):
                chat.say("/compare fail")
        else:
            chat.say("/compare a")
        assert chat.session.adapters.active == active

    def test_without_a_prompt(self, chat: Chat) -> None:
        with pytest.raises(KtrtError, match="expected /compare PROMPT"):
            chat.say("/compare")


class TestCompletion:
    @pytest.mark.parametrize(
        ("line", "found"),
        [
            ("/he", ["/help "]),
            ("/s", ["/system ", "/save ", "/set ", "/stats "]),
            ("/set te", ["/set temperature "]),
            ("/think ", ["/think on", "/think off"]),
            ("/adapter p", ["/adapter persona", "/adapter pirate"]),
            ("/file f", ["/file folder/"]),
            ("/file folder/", ["/file folder/a b.txt"]),
            ("/file /no/such/", []),
            ("/nope ", []),
            ("hello", []),
            ("", []),
        ],
    )
    def test_what_may_follow(self, chat: Chat, tmp_path: Path, line: str, found: list[str]) -> None:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "a b.txt").touch()
        assert list(completions(chat.talk, line)) == found
