// What you see: messages, notices, and who is online. Text is always `textContent`, never
// markup. Events wait for the next frame: all that arrives together costs one layout.

export const find = (id) => document.getElementById(id);
export const room = document.querySelector(".room");
const { user } = room.dataset; // from an attribute: a translator may rewrite text
const log = find("log");
const messages = find("messages");
const older = find("older");

const SHOWN = 300; // newest lines in the list; "Older messages" brings the others
const TALL = 20; // lines of a message; a taller one is folded
const LONG = /[^]{300}|(.*\n){20}/; // a text that may be that tall, on a phone

let queue = []; // events that wait for the next frame
let frame = 0;
let timer = 0;
let following = true; // whether the newest message is in sight
let height = 0; // of the log, at its last resize
let unseen = 0; // messages below the part in sight
let unread = 0; // messages that came while the page was hidden
let lastDay = ""; // of the newest message
let today = ""; // when the times were told
let busyTimer = 0; // until screen readers speak again
let loading = false; // older messages, one request at a time
const changed = []; // messages that an operator changed meanwhile
const pending = new Map(); // your items without a number, by nonce; they stand last

// --- From an event to an item ---
function make(name, text = "", properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text }, properties);
}

function makeMessage({ user: author, text, time, nonce }) {
  const item = make("li", "", { className: author === user ? "own" : "" });
  item.dataset.nonce = nonce;
  item.append(make("strong", author, { translate: false }), " ");
  item.append(make("time", "", { dateTime: time }), make("p"));
  setText(item, text);
  tellTime(item);
  return item;
}

function setText(item, text) {
  const p = item.querySelector("p");
  const shown = text || "This message was removed.";
  if (p.textContent === shown) return;
  p.replaceChildren(...link(shown));
  item.classList.toggle("removed", !text);
  unfold(item);
}

// Web addresses become links. chat.py has the same expression, for pages without script.
const ENDS = String.raw`()\s\x00-\x20\x7f-\xa0\u2000-\u206f\u3000-\u303f\ufeff\uff01-\uff0f<>\x22\x60`;
const LINK = new RegExp(
  String.raw`[Hh]ttps?://(?:[^${ENDS}]|\([^${ENDS}]*\))+(?<![.,:;!?'*_~|\]»])`, "gu");

function* link(text) {
  let end = 0;
  for (const { 0: address, index } of text.matchAll(LINK)) {
    yield text.slice(end, index);
    const rel = "noopener noreferrer nofollow";
    yield make("a", address, { href: address, target: "_blank", rel });
    end = index + address.length;
  }
  yield text.slice(end);
}

const timeOf = (item) => new Date(item.querySelector("time").dateTime);
const clock = new Intl.DateTimeFormat([], { timeStyle: "short" });
const fullDay = new Intl.DateTimeFormat([], { dateStyle: "full" });
const dayAndClock = new Intl.DateTimeFormat([], {
  month: "short", day: "numeric", hour: "numeric", minute: "numeric",
});

function tellTime(item) {
  const time = timeOf(item);
  const isToday = time.toDateString() === new Date().toDateString();
  const text = (isToday ? clock : dayAndClock).format(time);
  const element = item.querySelector("time");
  if (element.textContent === text) return;
  element.textContent = text;
  element.title = time.toLocaleString();
}

// Tell yesterday's times again when the date changes: "14:01" would be wrong then.
function tellTimes() {
  if (today === new Date().toDateString()) return;
  today = new Date().toDateString();
  quietly(() => {
    messages.querySelectorAll("[data-nonce]").forEach(tellTime);
    headDays();
  });
}

// A line with the day stands above the first message of each day.
function headDay(item) {
  const time = timeOf(item);
  if (time.toDateString() === lastDay) return;
  lastDay = time.toDateString();
  const line = make("li", fullDay.format(time), { className: "day", ariaLive: "off" });
  messages.insertBefore(line, item);
}

function headDays() {
  messages.querySelectorAll(".day").forEach((line) => line.remove());
  lastDay = "";
  messages.querySelectorAll("[data-id]").forEach(headDay);
}

// Screen readers don't speak a busy region. End with a timer: a hidden page has no frames.
function quietly(change) {
  log.ariaBusy = "true";
  change();
  clearTimeout(busyTimer);
  busyTimer = setTimeout(() => { log.ariaBusy = "false"; }, 100);
}

// --- Adding to the end, once per frame ---
export function show(event) {
  queue.push(event);
  if (document.hidden && isNews(event)) showUnread(unread + 1);
}

export function flushSoon() {
  if (timer || !queue.length) return;
  frame = requestAnimationFrame(flush);
  timer = setTimeout(flush, 200); // a hidden page gets no frames
}

export function flush() {
  if (!queue.length) return;
  cancelAnimationFrame(frame);
  clearTimeout(timer);
  timer = 0;
  const events = queue;
  queue = [];
  const items = events.map((event) => (event.type === "message" ? append(event) : note(event)));
  new Set(items).forEach((item) => item.people && tellPeople(item));
  if (document.hidden && unseen > SHOWN) following = true; // or a night away fills the page
  trim();
  fold(items);
  if (following) scrollToEnd();
  else showUnseen(unseen + events.filter(isNews).length);
}

const firstPending = () => pending.values().next().value ?? null;
const isNews = ({ type, user: author, text }) => type === "message" && author !== user && text;

// Your own message becomes the item that waited for it. Usually only attributes change, so
// a screen reader speaks it once.
function append(event) {
  let item = event.user === user && pending.get(event.nonce);
  if (item) {
    pending.delete(event.nonce);
    item.classList.remove("pending");
    item.querySelector("time").dateTime = event.time;
    tellTime(item);
    setText(item, event.text); // the server may have changed it
  } else {
    item = makeMessage(event);
    messages.insertBefore(item, firstPending());
  }
  item.dataset.id = event.id;
  headDay(item);
  return item;
}

// Joins and leaves that follow each other share one line.
function note({ type, user: name }) {
  const next = firstPending();
  let line = next ? next.previousElementSibling : messages.lastElementChild;
  if (!line?.people) {
    line = make("li", "", { className: "notice", translate: false });
    Object.assign(line, { ariaLive: "off", people: new Map() }); // not spoken
    messages.insertBefore(line, next);
  }
  line.people.delete(name); // each person's latest counts, and stands last
  line.people.set(name, type);
  return line;
}

function tellPeople(line) {
  const parts = [];
  for (const type of ["joined", "left"]) {
    let names = [...line.people.keys()].filter((name) => line.people.get(name) === type);
    if (names.length > 4) names = [...names.slice(0, 3), `${names.length - 3} others`];
    if (names.length) parts.push(`${names.join(", ")} ${type}`);
  }
  line.textContent = parts.join(" · ");
}

// Trim in steps: removing lines at the top moves all the others. The first line tells the
// day, so remove what stands below it.
function trim() {
  if (!following || loading) return; // the answer ends just above the first item
  let surplus = messages.children.length - pending.size - SHOWN;
  if (surplus < SHOWN / 6) return;
  for (; surplus > 0; surplus--) {
    const [top, next] = messages.children;
    (top.matches(".day") && !next.matches(".day") ? next : top).remove();
  }
  offerOlder();
}

// Measure only what may be tall: to read a height, the browser has to lay out the page.
function fold(items) {
  const long = items.filter((item) =>
    !item.unfolded && LONG.test(item.querySelector("p")?.textContent ?? ""));
  const tall = long.filter(({ lastElementChild: p }) =>
    p.scrollHeight > (TALL + 0.5) * parseFloat(getComputedStyle(p).lineHeight));
  for (const item of tall) {
    const button = make("button", "Show all", { type: "button", className: "quiet" });
    button.onclick = () => {
      item.unfolded = true;
      unfold(item);
      lookAtEnd();
      log.focus(); // or the focus would be lost with the button
    };
    item.classList.add("folded");
    item.append(button);
  }
}

function unfold(item) {
  item.classList.remove("folded");
  item.querySelector("button")?.remove();
}

// --- What you sent, until it has its number ---
export function showPending({ nonce, text }) {
  flush(); // what came before it stands above it
  const item = makeMessage({ user, text, time: new Date().toISOString(), nonce });
  item.classList.add("pending");
  pending.set(nonce, item);
  messages.append(item);
  fold([item]);
  scrollToEnd();
}

export function forget(nonce) {
  flush(); // its message may be waiting for the frame
  pending.get(nonce)?.remove();
  pending.delete(nonce);
}

// --- A number that is known: an operator may have changed the text ---
// Return false if it is another message: then the database was replaced.
export function update({ id, nonce, text }) {
  flush();
  if (loading) changed.push({ id, nonce, text }); // its item may be on its way
  const item = messages.querySelector(`[data-id="${id}"]`);
  if (item && item.dataset.nonce !== nonce) return false;
  if (item) setText(item, text);
  return true;
}

// --- The end of the list: following it, and what is new below ---
function lookAtEnd() { // within 5 pixels: browsers round
  following = log.scrollHeight - log.scrollTop - log.clientHeight < 5;
  if (following) showUnseen(0);
}

export function scrollToEnd() {
  following = true;
  log.scrollTop = log.scrollHeight;
  showUnseen(0);
}

function showUnseen(count) {
  unseen = count;
  find("new").hidden = !count;
  find("new").textContent = count === 1 ? "1 new message" : `${count} new messages`;
}

function showUnread(count) {
  unread = count;
  document.title = count ? `(${count}) Chat` : "Chat";
}

// --- The start of the list: older messages ---
function offerOlder() {
  const first = Number(messages.querySelector("[data-id]")?.dataset.id ?? 1);
  older.parentElement.hidden = first <= 1;
  older.search = `?before=${first}`;
  find("older-note").textContent = "";
}

async function showOlder(click) {
  if (click.ctrlKey || click.metaKey || click.shiftKey) return; // in a tab of its own
  click.preventDefault();
  if (loading) return;
  loading = true;
  older.textContent = "Loading …";
  offerOlder();
  await loadOlder().catch(() => {
    find("older-note").textContent = "The older messages could not be loaded. Try again in a moment.";
  });
  loading = false;
  older.textContent = "Older messages";
  changed.splice(0).forEach(update);
}

async function loadOlder() {
  const signal = AbortSignal.timeout(1000 * room.dataset.answer);
  const answer = await fetch(older.href, { redirect: "manual", signal });
  if (answer.type === "opaqueredirect") return location.assign(older.href); // signed out
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const items = [...page.querySelectorAll("[data-id]")];
  const focused = document.activeElement === older;
  if (items.length) quietly(() => prepend(items));
  else endOlder();
  if (older.parentElement.hidden && focused) log.focus(); // it would be lost with the link
}

function endOlder() {
  older.parentElement.hidden = true;
  find("older-note").textContent = "Older messages are not kept.";
}

// Keep what you read where it is: the list grows above it.
function prepend(items) {
  const anchor = messages.querySelector("[data-id]");
  const before = anchor.getBoundingClientRect().top;
  messages.prepend(...items);
  items.forEach(tellTime);
  headDays();
  fold(items);
  offerOlder();
  log.scrollTop += anchor.getBoundingClientRect().top - before;
  lookAtEnd();
}

// --- Who is online: one name in or out moves one item ---
const GROUP = 50; // names in one list: the browser lays out only the list that changes
const { compare } = new Intl.Collator("en");
const online = find("online");
const people = online.getElementsByTagName("li"); // live, in the order of `names`
let names = [];

export function showOnline(everybody) {
  names = [...everybody].sort(compare);
  online.replaceChildren();
  for (let start = 0; start < names.length; start += GROUP) {
    const list = online.appendChild(make("ul"));
    list.append(...names.slice(start, start + GROUP).map(makeName));
  }
  showCount();
}

export function enter(name) {
  if (names.includes(name)) return;
  const index = names.findIndex((other) => compare(other, name) > 0);
  if (index < 0) (online.lastElementChild ?? online.appendChild(make("ul"))).append(makeName(name));
  else people[index].before(makeName(name));
  names.splice(index < 0 ? names.length : index, 0, name);
  showCount();
}

export function leave(name) {
  const index = names.indexOf(name);
  if (index < 0) return;
  people[index].remove();
  names.splice(index, 1);
  showCount();
}

function showCount() {
  find("count").textContent = names.length || "";
}

const makeName = (name) => make("li", name, { translate: false });

// --- Wiring ---
export function start() {
  older.addEventListener("click", showOlder);
  find("new").addEventListener("click", () => {
    scrollToEnd();
    find("text").focus(); // the button is gone, so the focus would be lost
  });
  // A phone's keyboard: the scroll event comes first, and measures a log without its end.
  log.addEventListener("scroll", () => height === log.clientHeight && lookAtEnd());
  new ResizeObserver(() => {
    height = log.clientHeight;
    if (following) scrollToEnd();
    else lookAtEnd();
  }).observe(log);
  document.addEventListener("visibilitychange", () => {
    flush();
    tellTimes();
    if (!document.hidden) showUnread(0);
  });
  setInterval(tellTimes, 1000);
  tellTimes();
  fold([...messages.children]);
  scrollToEnd();
}
