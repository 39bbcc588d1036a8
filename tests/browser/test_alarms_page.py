"""The alarm list in a real Chromium: what it shows, by keyboard and on a phone; and acknowledging and shelving for real."""

import re
import time

import orjson
import pytest
from devtools import text_of
from operators_support import Plant
from test_console_page import EVIL, alarm, shot, site, stand
from worker_support import until

from preservarium.settings import Web

pytestmark = pytest.mark.browser

__all__ = ["site"]

ROWS = "document.querySelectorAll('#rows tr.alarm')"


def fill(site):
    now = time.time_ns() // 1_000
    stand(
        site.board,
        alarm(11, severity="critical", first_out=True, message="Cold store −2 °C", device_name="Cold store"),
        alarm(12, severity="critical", state="acknowledged", actor="ann", comment="on my way"),
        alarm(13, state="returned_unacknowledged", active=False, chattering=True),
        alarm(14, severity="minor", state="shelved", shelved_until=now + 1_800_000_000),
        alarm(15, severity="warning", state="out_of_service", alarm_id="", occurred_at=0, value=None, message=""),
    )


async def opened(page, site, *, rows=7):
    fill(site)
    await page.go(f"{site.url}alarms")
    await page.until(f"{ROWS}.length === {rows}")


async def test_the_list_says_what_needs_somebody_by_word_and_shape_and_not_only_by_colour(page, site):
    await page.size(1400, 900)
    await page.scheme("light")
    await opened(page, site)
    names = await page.js(
        f"[...{ROWS}].map(r => r.querySelector('.severity span').textContent + ' ' + r.querySelector('.statename').textContent)"
    )
    assert names == [
        "critical unacknowledged", "major unacknowledged", "major returned, unacknowledged", "minor unacknowledged", "critical acknowledged",
        "minor shelved", "warning out of service",
    ]  # fmt: skip
    shapes = await page.js(
        f"[...{ROWS}].map(r => r.querySelector('.shape path').getAttribute('d') + r.querySelector('.shape').classList.contains('filled'))"
    )
    assert len(set(shapes)) == 6  # a shape for each severity, filled where nobody has answered
    assert "first out" in await page.js(f"{ROWS}[0].innerText")
    assert "chattering" in await page.js(f"{ROWS}[2].innerText")
    assert re.search("(29|30) min left", await page.js(f"{ROWS}[5].innerText"))
    assert "ann: on my way" in await page.js(f"{ROWS}[4].innerText")
    assert "4 412 ppm" in (await page.js(f"{ROWS}[1].innerText")).replace("\xa0", " ")
    assert re.sub(r"\s+", " ", await page.js(text_of("#count-critical"))) == "2 critical 1 open"
    assert await page.js(text_of("#live")) == "live"
    assert (await page.js("document.title")).startswith("(4) ")
    assert await page.js("document.querySelectorAll('#rows img, #rows script').length") == 0
    await shot(page, "alarms-light.png")
    await page.scheme("dark")
    await shot(page, "alarms-dark.png")
    assert page.logged == []


async def test_filters_search_and_order(page, site):
    await opened(page, site)
    await page.js("document.querySelector('[data-state=waiting]').click()")
    await page.until(f"{ROWS}.length === 4")
    await page.js("document.getElementById('count-critical').click()")
    await page.until(f"{ROWS}.length === 1")
    assert await page.js("document.getElementById('count-critical').getAttribute('aria-pressed')") == "true"
    await page.js(
        "document.getElementById('count-critical').click(); document.querySelector('[data-state=standing]').click()"
    )
    await page.until(f"{ROWS}.length === 7")
    await page.js("const s = document.getElementById('sort'); s.value = 'oldest'; s.dispatchEvent(new Event('change'))")
    await page.until(f"{ROWS}[0].innerText.includes('out of service') || {ROWS}[0].innerText.includes('14 min')")
    await page.key("/", "/")
    for character in "cold":
        await page.key(character, character)
    await page.until(f"{ROWS}.length === 1")
    await page.js(
        "document.getElementById('search').value = 'nothing is like this'; document.getElementById('search').dispatchEvent(new Event('input'))"
    )
    await page.until("!document.getElementById('empty').hidden")
    assert await page.js(text_of("#empty")) == "No alarm is like that."
    await page.js("document.querySelector('[data-state=cleared]').click()")
    await page.until("document.getElementById('sort').disabled")
    assert page.logged == []


async def test_everything_works_by_keyboard_and_focus_comes_back(page, site):
    await opened(page, site)
    site.reads.history = [
        {"what": "transition", "at": 1_760_000_000_000_000, "name": "raised", "state": "unacknowledged", "actor": None, "comment": EVIL, "reason": None, "value": 3.5},
        {"what": "action", "at": 1_760_000_000_000_000, "name": "clear", "state": "", "actor": "bob", "comment": "", "reason": "still true", "value": None},
    ]  # fmt: skip
    await page.key("ArrowDown")
    assert await page.js(f"document.activeElement === {ROWS}[0]")
    await page.key("ArrowDown")
    await page.key("ArrowUp")
    await page.key("Enter")
    await page.until("document.querySelectorAll('.history li').length === 2")
    details = await page.js(text_of("tr.detail"))
    assert "refused: still true" in details
    assert EVIL in details
    assert await page.js(f"{ROWS}[0].querySelector('.details').getAttribute('aria-expanded')") == "true"
    await page.key("a", "a")
    await page.until("document.getElementById('dialog').open")
    assert await page.js("document.activeElement.id") == "d-actor"
    await page.js("document.getElementById('d-do').click()")
    assert "Who are you?" in await page.js(text_of("#d-fault"))
    await page.key("Escape")
    await page.until("!document.getElementById('dialog').open")
    # The dialog tells of its closing a moment later.
    await page.until("document.activeElement.dataset.action === 'acknowledge'")
    assert await page.js(f"document.activeElement.closest('tr') === {ROWS}[0]")
    # A comment needs a text.
    await page.key("c", "c")
    await page.until("document.getElementById('dialog').open")
    assert await page.js("document.activeElement.id") == "d-comment"
    await page.js("document.getElementById('d-actor').value = 'ann'; document.getElementById('d-do').click()")
    assert "needs a text" in await page.js(text_of("#d-fault"))
    assert site.sent == []


async def test_controls_have_names_and_what_changes_is_announced(page, site):
    await opened(page, site)
    unnamed = await page.js(
        "[...document.querySelectorAll('button, input, select, textarea, a')].filter(e => e.closest('dialog') === null && !e.hidden && "
        "!(e.getAttribute('aria-label') || e.innerText.trim() || document.querySelector(`label[for='${e.id}']`) || e.closest('label'))).map(e => e.outerHTML)"
    )
    assert unnamed == []
    assert await page.js(
        "['live', 'note', 'said', 'flood', 'd-fault'].every(i => ['status', 'alert'].includes(document.getElementById(i).getAttribute('role')))"
    )
    assert await page.js("[...document.querySelectorAll('th')].every(t => t.scope === 'col')")
    assert await page.js("document.getElementById('dialog').getAttribute('aria-labelledby')") == "d-title"


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_words_stand_out_from_their_ground(page, site, scheme):
    """WCAG 2.1, 1.4.3: at least 4.5:1 for the words of each kind of row."""
    await page.size(1400, 900)
    await page.scheme(scheme)
    await opened(page, site)
    ratios = await page.js(
        """(() => {
          const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const light = (c) => { const [r, g, b] = rgb(c).map((v) => { v /= 255; return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; });
            return .2126 * r + .7152 * g + .0722 * b; };
          const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255,255,255)"; };
          return [...document.querySelectorAll('#rows td span, #rows td div, #rows td button, #severities button, .tabs button, .pages a')]
            .filter((e) => e.innerText.trim() && !e.disabled)
            .map((e) => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x); return [(a + .05) / (b + .05), e.innerText]; })
            .filter(([r]) => r < 4.5);
        })()"""
    )
    assert ratios == []


async def test_a_phone_shows_cards_that_a_thumb_can_press(page, site):
    await page.size(390, 844, mobile=True)
    await opened(page, site)
    assert await page.js("document.documentElement.scrollWidth") <= 390
    small = await page.js(
        f"[...{ROWS}].flatMap(r => [...r.querySelectorAll('button')]).map(b => b.getBoundingClientRect().height).filter(h => h < 40)"
    )
    assert small == []
    await page.js(f"{ROWS}[0].querySelector('[data-action=shelve]').click()")
    await page.until("document.getElementById('dialog').open")
    box = await page.js(
        "(() => { const r = document.getElementById('dialog').getBoundingClientRect(); return [r.left, r.right]; })()"
    )
    assert box[0] >= 0
    assert box[1] <= 390
    await shot(page, "alarms-phone.png")
    assert page.logged == []


def answering(site, refuse=()):
    """The machine's part: what is sent is answered, done but for the devices that are refused."""

    async def publish(sends):
        for send in sends:
            site.sent.append(send)
            line = orjson.loads(send.value)
            refused = line["device_id"] in refuse
            said = {"outcome": "refused", "code": "already_acknowledged", "reason": f"it is acknowledged already {EVIL}"} if refused else {
                "outcome": "done", "code": "", "reason": ""}  # fmt: skip
            site.board.answer(orjson.dumps({"action_id": line["action_id"], "state": "acknowledged", **said}))

    site.desk.publish = publish


async def test_several_are_chosen_and_acted_upon_at_once_and_refusals_are_listed(page, site):
    await page.size(1400, 900)
    await page.scheme("light")
    answering(site, refuse={alarm(11)["device_id"]})
    await opened(page, site)
    assert await page.js("document.getElementById('bulk').hidden")
    await page.js("document.getElementById('all').click()")
    await page.until("document.getElementById('chosen').innerText === '7 of 7 selected'")
    texts = "[...document.querySelectorAll('#bulk button')].map(b => b.textContent + (b.disabled ? ' off' : ''))"
    assert await page.js(texts) == ["Acknowledge 4", "Shelve 6", "Unshelve 1", "Comment 7"]
    await shot(page, "alarms-selected.png")
    await page.js(f"{ROWS}[1].querySelector('input').click()")
    assert await page.js("document.getElementById('all').indeterminate")
    await page.js("document.querySelector('[data-bulk=acknowledge]').click()")
    await page.until("document.getElementById('dialog').open")
    assert await page.js(text_of("#d-title")) == "Acknowledge 3 alarms"
    assert await page.js("document.querySelectorAll('#d-about > div').length") == 3
    # One that is raised while the operator reads is not among them.
    stand(site.board, alarm(40, severity="critical"))
    await page.js("document.getElementById('d-actor').value = 'ann'")
    await shot(page, "alarms-several.png")
    await page.js("document.getElementById('d-do').click()")
    await page.until("!document.getElementById('dialog').open")
    assert await page.js(text_of("#said")) == "Acknowledge: 2 done, 1 refused."
    lines = [orjson.loads(send.value) for send in site.sent]
    assert sorted((line["device_id"][-2:], line["alarm_id"], line["actor"]) for line in lines) == [
        ("09", "a9", "ann"), ("11", "a11", "ann"), ("13", "a13", "ann"),
    ]  # fmt: skip
    assert await page.js("document.querySelectorAll('#r-list li').length") == 1
    listed = await page.js(text_of("#results"))
    assert "1 of 3 refused" in listed
    assert "Cold store · co2-high" in listed
    assert EVIL in listed
    assert await page.js("document.getElementById('bulk').hidden")
    assert await page.js("document.activeElement.id") == "all"
    await page.js("document.getElementById('r-close').click()")
    assert await page.js("document.getElementById('results').hidden")
    assert page.logged == []


async def test_several_by_keyboard_and_what_changes_is_not_chosen_any_more(page, site):
    await opened(page, site)
    for _ in range(3):
        await page.key("ArrowDown")
    await page.key(" ", " ")
    await page.key("ArrowUp")
    await page.key(" ", " ")
    await page.until("document.getElementById('chosen').innerText === '2 of 7 selected'")
    assert await page.js(f"[...{ROWS}].map(r => r.getAttribute('aria-selected')).join()") == (
        "false,true,true,false,false,false,false"
    )
    await page.key("s", "s")
    await page.until("document.getElementById('dialog').open")
    assert await page.js(text_of("#d-title")) == "Shelve 2 alarms"
    await page.key("Escape")
    await page.until("!document.getElementById('dialog').open")
    # It came again: whoever chose it has not seen this one.
    stand(site.board, alarm(13, alarm_id="a13-again", state="unacknowledged"))
    await page.until("document.getElementById('chosen').innerText === '1 of 7 selected'")
    await page.js(f"{ROWS}[0].focus()")
    await page.key("Escape")
    await page.until("document.getElementById('bulk').hidden")
    await page.js("document.getElementById('all').click(); document.querySelector('[data-state=waiting]').click()")
    await page.until(f"{ROWS}.length === 4 && document.getElementById('bulk').hidden")
    assert site.sent == []
    assert page.logged == []


async def test_several_on_a_phone(page, site):
    await page.size(390, 844, mobile=True)
    await opened(page, site)
    await page.js("document.getElementById('all').click()")
    await page.until("!document.getElementById('bulk').hidden")
    assert await page.js("document.documentElement.scrollWidth") <= 390
    small = await page.js(
        "[...document.querySelectorAll('#bulk button, #rows .c-check label')].map(b => b.getBoundingClientRect().height).filter(h => h < 40)"
    )
    assert small == []
    await shot(page, "alarms-phone-selected.png")
    assert page.logged == []


async def test_a_flood_and_a_list_that_may_be_old_are_said(page, site):
    await opened(page, site)
    now = time.time_ns() // 1_000
    stand(site.board, *(alarm(100 + n, detected_at=now, severity="warning") for n in range(12)))
    await page.until("!document.getElementById('flood').hidden")
    assert "Alarm flood" in await page.js(text_of("#flood"))
    site.board.trouble = "Kafka: no answer"
    await page.until("document.getElementById('live').innerText === 'may be old'")
    assert "may be old" in await page.js(text_of("#note"))


async def test_a_token_is_asked_for_and_kept_for_the_tab_only(page, site):
    site.settings.web = Web(operators="ann:s3cret")
    fill(site)
    await page.go(f"{site.url}alarms")
    await page.until("!document.getElementById('login').hidden")
    assert await page.js(f"{ROWS}.length") == 0
    assert await page.js(text_of("#note")) == "Alarms are shown to operators."
    login = "document.querySelector('#login button').click()"
    await page.js(f"document.getElementById('l-token').value = 'guess'; {login}")
    assert not await page.js("document.getElementById('login').hidden")
    await page.js(f"document.getElementById('l-token').value = 's3cret'; {login}")
    await page.until(f"{ROWS}.length === 7 && document.getElementById('login').hidden")
    # Acting asks again where the token was taken away meanwhile.
    await page.js(f"{ROWS}[0].querySelector('[data-action=acknowledge]').click()")
    await page.js(
        "document.getElementById('d-token').value = ''; document.getElementById('d-actor').value = 'ann'; document.getElementById('d-do').click()"
    )
    await page.until("document.getElementById('d-fault').innerText.includes('is needed')")
    assert not await page.js("document.getElementById('d-login').hidden")
    assert site.sent == []
    await page.js("document.getElementById('d-token').value = 'wrong'; document.getElementById('d-do').click()")
    await page.until("document.getElementById('d-fault').innerText.includes('wrong')")
    await page.js("document.getElementById('d-token').value = 's3cret'; document.getElementById('d-do').click()")
    await page.until("!document.getElementById('dialog').open")
    assert len(site.sent) == 1
    assert (
        await page.js(
            "localStorage.getItem('operator') + sessionStorage.getItem('operator-token') + localStorage.getItem('operator-token')"
        )
        == "anns3cretnull"
    )


async def test_an_operator_acknowledges_and_shelves_on_a_real_worker(page, kafka, topic_prefix, pg_dsn, tmp_path):
    plant = Plant(kafka, topic_prefix, pg_dsn, tmp_path)
    try:
        await plant.open("dev-1", "dev-2")
        url = await plant.start()
        await plant.raises("dev-1", "dev-2")
        await page.size(1400, 900)
        await page.go(f"{url}/alarms")
        await page.until(f"{ROWS}.length === 2")

        async def do(device, action, fill=""):
            await page.js(
                f"[...{ROWS}].find(r => r.innerText.includes('{device}')).querySelector('[data-action={action}]').click()"
            )
            await page.until("document.getElementById('dialog').open")
            await page.js(
                f"document.getElementById('d-actor').value = 'ann'; {fill}; document.getElementById('d-do').click()"
            )
            await page.until("!document.getElementById('dialog').open")

        def row(device):
            return f"([...{ROWS}].find(r => r.innerText.includes('{device}')) || document.body).innerText"

        await do("dev-1", "acknowledge", "document.getElementById('d-comment').value = 'fan is being repaired'")
        await page.until("document.getElementById('said').innerText === 'Box dev-1: acknowledged.'")
        await page.until(f"{row('dev-1')}.includes('ann: fan is being repaired')")
        await do("dev-2", "shelve", "document.querySelector('#d-choices input[value=\"900\"]').click()")
        await page.until("document.getElementById('said').innerText === 'Box dev-2: shelved.'")
        await page.until(f"/1[45] min left/.test({row('dev-2')})")
        # The history is the database's, which follows.
        await page.js(f"[...{ROWS}].find(r => r.innerText.includes('dev-1')).querySelector('.details').click()")
        await page.until("document.querySelectorAll('.history li b').length === 2")
        assert await page.js("[...document.querySelectorAll('.history li b')].map(b => b.textContent)") == [
            "acknowledged",
            "raised",
        ]
        # What somebody else did meanwhile is refused, and that is said.
        await plant.reads("dev-1", 20)
        await page.until(f"{ROWS}.length === 1")
        await do("dev-2", "unshelve")
        await page.until(f"{row('dev-2')}.includes('unacknowledged')")
        await page.js(f"[...{ROWS}][0].querySelector('[data-action=acknowledge]').click()")
        await page.until("document.getElementById('dialog').open")
        await plant.act("dev-2", "acknowledge")

        async def acknowledged():
            return await page.js(f"{row('dev-2')}.includes('bob')")

        await until(acknowledged, 20)
        await page.js("document.getElementById('d-do').click()")
        await page.until(
            "document.getElementById('said').innerText.includes('refused: the alarm is acknowledged already')"
        )
        assert page.logged == []
    finally:
        await plant.close()
