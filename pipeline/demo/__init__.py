"""The demo world: small narrated videos with complete ground truth, and a loopback server for them.

Read in this order: `grammar` (scenes and true sentences about them), `render` (their pixels), `narration` (speech and
subtitle files), `plan` (settings, and each video before it is drawn), `world` (a folder of videos with a truth file),
`server` (the folder over HTTP).
"""
