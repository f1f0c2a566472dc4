-- The embedded archive: the tables and columns of the ALMA archive that this project reads, with examples.
--
-- `stagecal init` makes an SQLite file of it. Names are those of the archive, the types are ours, and there are no keys
-- because the archive's own views have none. The queries (etc/queries) call each table ALMA.X; the adapter attaches
-- this file under that name. Identifiers of projects, MOUSs and execution blocks that were published with the
-- procedure are real; the rest, persons at example.org and release dates in 2099 among it, is made up.
--
--   MOUS                   project         what it is an example of
--   uid://A001/X12a3/X80e  2017.1.01347.S  two EBs, one SemiPass and one Pass; a PI and a delegee; not yet public
--   uid://A001/X1296/X675  2017.1.00727.S  public: anyone is entitled
--   uid://A001/X133d/X3cf3 2018.1.01406.S  not yet public, one EB
--   uid://A001/X159a/X6b   2021.1.01582.S  not yet public: its calibrators are for anyone
--   uid://A001/X14d7/X160  2019.1.00337.S  delivered once, now under review: MOUS IN QA3
--   uid://A001/X1284/X265f 2017.1.00370.S  observed, not processed: MOUS NOT DELIVERED
--   uid://A001/X1284/X266  2017.1.00370.S  delivered without an EB that passed: NO QA0_PASS DATA
--   uid://A002/X2a5c2f/X1  2011.0.00010.S  of Cycle 0, whose calibrated data lie in the archive: CYCLE 0 PROJECT

BEGIN;

-- Projects: the code that people use, and the UID of the ObsProject that other tables use.
CREATE TABLE ASA_PROJECT (
    PROJECT_UID TEXT,
    PROJECT_CODE TEXT
);
INSERT INTO ASA_PROJECT (PROJECT_UID, PROJECT_CODE) VALUES
    ('uid://A001/X1221/Xdf8', '2017.1.01347.S'),
    ('uid://A001/X1220/X8c1', '2017.1.00727.S'),
    ('uid://A001/X12f5/X19b', '2018.1.01406.S'),
    ('uid://A001/X1528/Xa21', '2021.1.01582.S'),
    ('uid://A001/X1465/X2e4', '2019.1.00337.S'),
    ('uid://A001/X1220/X2b7', '2017.1.00370.S'),
    ('uid://A002/X2a5c2f/X6', '2011.0.00010.S');

-- Persons who registered with ALMA.
CREATE TABLE ACCOUNT (
    ACCOUNT_ID TEXT,
    EMAIL TEXT
);
INSERT INTO ACCOUNT (ACCOUNT_ID, EMAIL) VALUES
    ('pi', 'pi@example.org'),
    ('delegee', 'delegee@example.org'),
    ('judits', 'judits@phys.ethz.ch');

-- Proposals: who is the PI of a project.
CREATE TABLE BMMV_OBSPROPOSAL (
    PROJECTUID TEXT,
    PI_USERID TEXT
);
INSERT INTO BMMV_OBSPROPOSAL (PROJECTUID, PI_USERID) VALUES
    ('uid://A001/X1221/Xdf8', 'pi'),
    ('uid://A001/X1220/X8c1', 'judits'),
    ('uid://A001/X12f5/X19b', 'pi'),
    ('uid://A001/X1528/Xa21', 'pi'),
    ('uid://A001/X1465/X2e4', 'pi'),
    ('uid://A001/X1220/X2b7', 'pi'),
    ('uid://A002/X2a5c2f/X6', 'pi');

-- A table of our own: persons to whom a PI has given access. Where the archive keeps them is not public;
-- a real site makes this table, or overrides etc/queries/entitled.sql.
CREATE TABLE STAGECAL_DELEGEE (
    PROJECTUID TEXT,
    ACCOUNT_ID TEXT
);
INSERT INTO STAGECAL_DELEGEE (PROJECTUID, ACCOUNT_ID) VALUES
    ('uid://A001/X1221/Xdf8', 'delegee');

-- Observation unit sets: state and place in the project of each MOUS, its group (GOUS) and science set (SOUS).
-- DOMAIN_ENTITY_ID is the partId within the ObsProject; XML is the OUSStatus document, whose sessions count in their
-- order, those of EBs that did not pass included.
CREATE TABLE OBS_UNIT_SET_STATUS (
    STATUS_ENTITY_ID TEXT,
    DOMAIN_ENTITY_ID TEXT,
    DOMAIN_ENTITY_STATE TEXT,
    PARENT_OBS_UNIT_SET_STATUS_ID TEXT,
    OBS_PROJECT_STATUS_ID TEXT,
    OBS_PROJECT_ID TEXT,
    XML TEXT
);

-- uid://A001/X12a3/X80e (2017.1.01347.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X12a3/X80e', 'X659301709', 'Delivered', 'uid://A001/X12a3/X80d', 'uid://A001/X1221/Xdfc', 'uid://A001/X1221/Xdf8', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:orv="Alma/ObsPrep/ObsReview" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:oat="Alma/ObsPrep/ObsAttachment" xmlns:ps="Alma/Scheduling/ProjectStatus" xmlns:sbs="Alma/Scheduling/SBStatus" xmlns:prj="Alma/ObsPrep/ObsProject" xmlns:ent="Alma/CommonEntity" xmlns:sbl="Alma/ObsPrep/SchedBlock" xmlns:prp="Alma/ObsPrep/ObsProposal" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" schemaVersion="13" revision="23" almatype="APDM::OUSStatus" xsi:type="ouss:OUSStatus">
  <ps:Status State="Delivered"/>
  <ps:TimeOfUpdate>2018-07-10 11:00:46.672</ps:TimeOfUpdate>
  <ps:executionsRemaining>-1</ps:executionsRemaining>
  <ps:successfulExecutions>2</ps:successfulExecutions>
  <ps:failedExecutions>0</ps:failedExecutions>
  <ps:secondsRemaining>7200</ps:secondsRemaining>
  <ps:successfulSeconds>0</ps:successfulSeconds>
  <ps:failedSeconds>0</ps:failedSeconds>
  <ps:hasExecutionCount>true</ps:hasExecutionCount>
  <ps:hasTimeLimit>true</ps:hasTimeLimit>
  <ps:bookkeepingInitialized>false</ps:bookkeepingInitialized>
  <ps:TotalUsedTimeInSec>0</ps:TotalUsedTimeInSec>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X12a3/X80d" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X1221/Xdfc" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X12a3/X80e" entityIdEncrypted="-- id encryption not implemented --" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X1221/Xdf8" partId="X659301709" entityTypeName="ObsProject"/>
  <ouss:NumberSBsCompleted>2</ouss:NumberSBsCompleted>
  <ouss:SBStatusRef entityId="uid://A001/X12a3/X80f" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2018-06-06 12:41:10.826</ouss:StartTime>
    <ouss:EndTime>2018-06-06 13:07:22.036</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xce574d/Xa33e</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X12a3/X80f" entityTypeName="SBStatus"/>
  </ouss:Session>
  <ouss:Session entityPartId="X00000001" almatype="APDM::Session">
    <ouss:StartTime>2018-07-10 10:34:32.962</ouss:StartTime>
    <ouss:EndTime>2018-07-10 11:00:46.858</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xcf92df/X3453</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X12a3/X80f" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- uid://A001/X1296/X675 (2017.1.00727.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X1296/X675', 'X1804720385', 'Delivered', 'uid://A001/X1296/X674', 'uid://A001/X1220/X8c5', 'uid://A001/X1220/X8c1', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">
  <ps:Status State="Delivered"/>
  <ps:TimeOfUpdate>2018-06-27 11:02:45.310</ps:TimeOfUpdate>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X1296/X674" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X1220/X8c5" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X1296/X675" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X1220/X8c1" partId="X1804720385" entityTypeName="ObsProject"/>
  <ouss:SBStatusRef entityId="uid://A001/X1296/X676" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2018-05-18 04:12:31.104</ouss:StartTime>
    <ouss:EndTime>2018-05-18 05:03:44.611</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xcd8029/X5e1a</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X1296/X676" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- uid://A001/X133d/X3cf3 (2018.1.01406.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X133d/X3cf3', 'X1306277114', 'Delivered', 'uid://A001/X133d/X3cf2', 'uid://A001/X12f5/X19f', 'uid://A001/X12f5/X19b', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">
  <ps:Status State="Delivered"/>
  <ps:TimeOfUpdate>2018-12-10 09:41:17.006</ps:TimeOfUpdate>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X133d/X3cf2" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X12f5/X19f" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X133d/X3cf3" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X12f5/X19b" partId="X1306277114" entityTypeName="ObsProject"/>
  <ouss:SBStatusRef entityId="uid://A001/X133d/X3cf4" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2018-11-02 03:20:09.452</ouss:StartTime>
    <ouss:EndTime>2018-11-02 04:31:57.218</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xd33a12/X15be</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X133d/X3cf4" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- uid://A001/X159a/X6b (2021.1.01582.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X159a/X6b', 'X517038842', 'Delivered', 'uid://A001/X159a/X6a', 'uid://A001/X1528/Xa25', 'uid://A001/X1528/Xa21', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">
  <ps:Status State="Delivered"/>
  <ps:TimeOfUpdate>2022-02-20 15:20:08.774</ps:TimeOfUpdate>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X159a/X6a" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X1528/Xa25" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X159a/X6b" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X1528/Xa21" partId="X517038842" entityTypeName="ObsProject"/>
  <ouss:SBStatusRef entityId="uid://A001/X159a/X6c" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2022-01-14 01:47:52.733</ouss:StartTime>
    <ouss:EndTime>2022-01-14 02:40:18.025</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xf531c1/X2b4d</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X159a/X6c" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- uid://A001/X14d7/X160 (2019.1.00337.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X14d7/X160', 'X930461157', 'QA3InProgress', 'uid://A001/X14d7/X15f', 'uid://A001/X1465/X2e8', 'uid://A001/X1465/X2e4', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">
  <ps:Status State="QA3InProgress"/>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X14d7/X15f" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X1465/X2e8" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X14d7/X160" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X1465/X2e4" partId="X930461157" entityTypeName="ObsProject"/>
  <ouss:SBStatusRef entityId="uid://A001/X14d7/X161" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2019-11-21 02:05:40.190</ouss:StartTime>
    <ouss:EndTime>2019-11-21 03:11:02.876</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xe1d2cb/X4f77</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X14d7/X161" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- uid://A001/X1284/X265f (2017.1.00370.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X1284/X265f', 'X2045518861', 'ReadyForProcessing', 'uid://A001/X1284/X265e', 'uid://A001/X1220/X2bb', 'uid://A001/X1220/X2b7', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">
  <ps:Status State="ReadyForProcessing"/>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X1284/X265e" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X1220/X2bb" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X1284/X265f" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X1220/X2b7" partId="X2045518861" entityTypeName="ObsProject"/>
  <ouss:SBStatusRef entityId="uid://A001/X1284/X2660" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2017-11-14 03:01:14.310</ouss:StartTime>
    <ouss:EndTime>2017-11-14 04:12:45.907</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xc7111c/X3979</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X1284/X2660" entityTypeName="SBStatus"/>
  </ouss:Session>
  <ouss:Session entityPartId="X00000001" almatype="APDM::Session">
    <ouss:StartTime>2017-11-14 04:20:31.508</ouss:StartTime>
    <ouss:EndTime>2017-11-14 05:31:58.244</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xc7111c/X409e</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X1284/X2660" entityTypeName="SBStatus"/>
  </ouss:Session>
  <ouss:Session entityPartId="X00000002" almatype="APDM::Session">
    <ouss:StartTime>2017-11-15 03:07:22.915</ouss:StartTime>
    <ouss:EndTime>2017-11-15 04:18:50.602</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xc7111c/X86a7</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X1284/X2660" entityTypeName="SBStatus"/>
  </ouss:Session>
  <ouss:Session entityPartId="X00000003" almatype="APDM::Session">
    <ouss:StartTime>2017-11-16 02:58:03.127</ouss:StartTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xc72427/X2dfe</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X1284/X2660" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- uid://A001/X1284/X266 (2017.1.00370.S)
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X1284/X266', 'X376901524', 'Delivered', 'uid://A001/X1284/X265', 'uid://A001/X1220/X2bb', 'uid://A001/X1220/X2b7', '<?xml version="1.0" encoding="UTF-8"?>
<ouss:OUSStatus xmlns:val="Alma/ValueTypes" xmlns:ouss="Alma/Scheduling/OUSStatus" xmlns:ps="Alma/Scheduling/ProjectStatus" schemaVersion="13" almatype="APDM::OUSStatus">
  <ps:Status State="Delivered"/>
  <ps:TimeOfUpdate>2017-12-01 08:12:55.120</ps:TimeOfUpdate>
  <ps:ContainingObsUnitSetRef entityId="uid://A001/X1284/X265" entityTypeName="OUSStatus" documentVersion="1"/>
  <ps:ProjectStatusRef entityId="uid://A001/X1220/X2bb" entityTypeName="ProjectStatus" documentVersion="1"/>
  <ouss:OUSStatusEntity entityId="uid://A001/X1284/X266" entityTypeName="OUSStatus" schemaVersion="13"/>
  <ouss:ObsUnitSetRef entityId="uid://A001/X1220/X2b7" partId="X376901524" entityTypeName="ObsProject"/>
  <ouss:SBStatusRef entityId="uid://A001/X1284/X267" entityTypeName="SBStatus" documentVersion="1"/>
  <ouss:Session entityPartId="X00000000" almatype="APDM::Session">
    <ouss:StartTime>2017-11-08 05:44:19.660</ouss:StartTime>
    <ouss:EndTime>2017-11-08 06:01:33.048</ouss:EndTime>
    <ouss:ExecBlockRef>
      <val:ExecBlockId>uid://A002/Xc6c0d7/X7e2b</val:ExecBlockId>
    </ouss:ExecBlockRef>
    <ouss:SBStatusRef entityId="uid://A001/X1284/X267" entityTypeName="SBStatus"/>
  </ouss:Session>
</ouss:OUSStatus>');

-- The science and group observation unit sets above them.
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A001/X12a3/X80c', 'X659301711', 'Delivered', NULL, 'uid://A001/X1221/Xdfc', 'uid://A001/X1221/Xdf8', NULL),
    ('uid://A001/X12a3/X80d', 'X659301710', 'Delivered', 'uid://A001/X12a3/X80c', 'uid://A001/X1221/Xdfc', 'uid://A001/X1221/Xdf8', NULL),
    ('uid://A001/X1296/X673', 'X1804720387', 'Delivered', NULL, 'uid://A001/X1220/X8c5', 'uid://A001/X1220/X8c1', NULL),
    ('uid://A001/X1296/X674', 'X1804720386', 'Delivered', 'uid://A001/X1296/X673', 'uid://A001/X1220/X8c5', 'uid://A001/X1220/X8c1', NULL),
    ('uid://A001/X133d/X3cf1', 'X1306277116', 'Delivered', NULL, 'uid://A001/X12f5/X19f', 'uid://A001/X12f5/X19b', NULL),
    ('uid://A001/X133d/X3cf2', 'X1306277115', 'Delivered', 'uid://A001/X133d/X3cf1', 'uid://A001/X12f5/X19f', 'uid://A001/X12f5/X19b', NULL),
    ('uid://A001/X159a/X69', 'X517038844', 'Delivered', NULL, 'uid://A001/X1528/Xa25', 'uid://A001/X1528/Xa21', NULL),
    ('uid://A001/X159a/X6a', 'X517038843', 'Delivered', 'uid://A001/X159a/X69', 'uid://A001/X1528/Xa25', 'uid://A001/X1528/Xa21', NULL),
    ('uid://A001/X14d7/X15e', 'X930461159', 'QA3InProgress', NULL, 'uid://A001/X1465/X2e8', 'uid://A001/X1465/X2e4', NULL),
    ('uid://A001/X14d7/X15f', 'X930461158', 'QA3InProgress', 'uid://A001/X14d7/X15e', 'uid://A001/X1465/X2e8', 'uid://A001/X1465/X2e4', NULL),
    ('uid://A001/X1284/X265d', 'X2045518863', 'PartiallyObserved', NULL, 'uid://A001/X1220/X2bb', 'uid://A001/X1220/X2b7', NULL),
    ('uid://A001/X1284/X265e', 'X2045518862', 'PartiallyObserved', 'uid://A001/X1284/X265d', 'uid://A001/X1220/X2bb', 'uid://A001/X1220/X2b7', NULL),
    ('uid://A001/X1284/X264', 'X376901526', 'Delivered', NULL, 'uid://A001/X1220/X2bb', 'uid://A001/X1220/X2b7', NULL),
    ('uid://A001/X1284/X265', 'X376901525', 'Delivered', 'uid://A001/X1284/X264', 'uid://A001/X1220/X2bb', 'uid://A001/X1220/X2b7', NULL);

-- A MOUS of Cycle 0, of which the archive has neither a status document nor EBs in the tables of today.
INSERT INTO OBS_UNIT_SET_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_STATUS_ID, OBS_PROJECT_ID, XML) VALUES
    ('uid://A002/X2a5c2f/X1', 'X1000000001', 'Delivered', NULL, 'uid://A002/X2a5c2f/X7', 'uid://A002/X2a5c2f/X6', NULL);

-- Observation unit sets as the quality assurance knows them: ObsProject and partId of a MOUS.
CREATE TABLE AQUA_OUS (
    OBSUNITSETUID TEXT,
    OBSUNITSETPARTID TEXT,
    OUS_STATUS_ENTITY_ID TEXT
);
INSERT INTO AQUA_OUS (OBSUNITSETUID, OBSUNITSETPARTID, OUS_STATUS_ENTITY_ID) VALUES
    ('uid://A001/X1221/Xdf8', 'X659301709', 'uid://A001/X12a3/X80e'),
    ('uid://A001/X1220/X8c1', 'X1804720385', 'uid://A001/X1296/X675'),
    ('uid://A001/X12f5/X19b', 'X1306277114', 'uid://A001/X133d/X3cf3'),
    ('uid://A001/X1528/Xa21', 'X517038842', 'uid://A001/X159a/X6b'),
    ('uid://A001/X1465/X2e4', 'X930461157', 'uid://A001/X14d7/X160'),
    ('uid://A001/X1220/X2b7', 'X2045518861', 'uid://A001/X1284/X265f'),
    ('uid://A001/X1220/X2b7', 'X376901524', 'uid://A001/X1284/X266');

-- Scheduling blocks: which one observes for which MOUS.
CREATE TABLE BMMV_SCHEDBLOCK (
    ARCHIVE_UID TEXT,
    MOUS_STATUS_UID TEXT,
    SB_STATUS_UID TEXT,
    SB_NAME TEXT
);
INSERT INTO BMMV_SCHEDBLOCK (ARCHIVE_UID, MOUS_STATUS_UID, SB_STATUS_UID, SB_NAME) VALUES
    ('uid://A001/X12a3/X804', 'uid://A001/X12a3/X80e', 'uid://A001/X12a3/X80f', 'HL_Tau_a_06_TM1'),
    ('uid://A001/X1296/X66b', 'uid://A001/X1296/X675', 'uid://A001/X1296/X676', 'HL_Tau_b_07_TM1'),
    ('uid://A001/X133d/X3ce9', 'uid://A001/X133d/X3cf3', 'uid://A001/X133d/X3cf4', 'HL_Tau_a_03_TM2'),
    ('uid://A001/X159a/X61', 'uid://A001/X159a/X6b', 'uid://A001/X159a/X6c', 'HL_Tau_c_06_TM1'),
    ('uid://A001/X14d7/X156', 'uid://A001/X14d7/X160', 'uid://A001/X14d7/X161', 'HL_Tau_a_04_7M'),
    ('uid://A001/X1284/X2655', 'uid://A001/X1284/X265f', 'uid://A001/X1284/X2660', 'HL_Tau_d_06_TM1'),
    ('uid://A001/X1284/X25d', 'uid://A001/X1284/X266', 'uid://A001/X1284/X267', 'HL_Tau_d_03_TM1');

-- States of the scheduling blocks.
CREATE TABLE SCHED_BLOCK_STATUS (
    STATUS_ENTITY_ID TEXT,
    DOMAIN_ENTITY_ID TEXT,
    DOMAIN_ENTITY_STATE TEXT,
    PARENT_OBS_UNIT_SET_STATUS_ID TEXT,
    OBS_PROJECT_ID TEXT
);
INSERT INTO SCHED_BLOCK_STATUS (STATUS_ENTITY_ID, DOMAIN_ENTITY_ID, DOMAIN_ENTITY_STATE, PARENT_OBS_UNIT_SET_STATUS_ID, OBS_PROJECT_ID) VALUES
    ('uid://A001/X12a3/X80f', 'uid://A001/X12a3/X804', 'FullyObserved', 'uid://A001/X12a3/X80e', 'uid://A001/X1221/Xdf8'),
    ('uid://A001/X1296/X676', 'uid://A001/X1296/X66b', 'FullyObserved', 'uid://A001/X1296/X675', 'uid://A001/X1220/X8c1'),
    ('uid://A001/X133d/X3cf4', 'uid://A001/X133d/X3ce9', 'FullyObserved', 'uid://A001/X133d/X3cf3', 'uid://A001/X12f5/X19b'),
    ('uid://A001/X159a/X6c', 'uid://A001/X159a/X61', 'FullyObserved', 'uid://A001/X159a/X6b', 'uid://A001/X1528/Xa21'),
    ('uid://A001/X14d7/X161', 'uid://A001/X14d7/X156', 'FullyObserved', 'uid://A001/X14d7/X160', 'uid://A001/X1465/X2e4'),
    ('uid://A001/X1284/X2660', 'uid://A001/X1284/X2655', 'FullyObserved', 'uid://A001/X1284/X265f', 'uid://A001/X1220/X2b7'),
    ('uid://A001/X1284/X267', 'uid://A001/X1284/X25d', 'FullyObserved', 'uid://A001/X1284/X266', 'uid://A001/X1220/X2b7');

-- Execution blocks (EB = ASDM) with the result of the quality check at the telescope (QA0). ENDTIME may be missing.
CREATE TABLE AQUA_EXECBLOCK (
    EXECBLOCKUID TEXT,
    SCHEDBLOCKUID TEXT,
    OBSPROJECTCODE TEXT,
    QA0STATUS TEXT,
    STARTTIME TEXT,
    ENDTIME TEXT,
    SESSIONID TEXT
);
INSERT INTO AQUA_EXECBLOCK (EXECBLOCKUID, SCHEDBLOCKUID, OBSPROJECTCODE, QA0STATUS, STARTTIME, ENDTIME, SESSIONID) VALUES
    ('uid://A002/Xce574d/Xa33e', 'uid://A001/X12a3/X804', '2017.1.01347.S', 'SemiPass', '2018-06-06 12:41:10.826', '2018-06-06 13:07:22.036', 'X00000000'),
    ('uid://A002/Xcf92df/X3453', 'uid://A001/X12a3/X804', '2017.1.01347.S', 'Pass', '2018-07-10 10:34:32.962', '2018-07-10 11:00:46.858', 'X00000001'),
    ('uid://A002/Xcd8029/X5e1a', 'uid://A001/X1296/X66b', '2017.1.00727.S', 'Pass', '2018-05-18 04:12:31.104', '2018-05-18 05:03:44.611', 'X00000000'),
    ('uid://A002/Xd33a12/X15be', 'uid://A001/X133d/X3ce9', '2018.1.01406.S', 'Pass', '2018-11-02 03:20:09.452', '2018-11-02 04:31:57.218', 'X00000000'),
    ('uid://A002/Xf531c1/X2b4d', 'uid://A001/X159a/X61', '2021.1.01582.S', 'Pass', '2022-01-14 01:47:52.733', '2022-01-14 02:40:18.025', 'X00000000'),
    ('uid://A002/Xe1d2cb/X4f77', 'uid://A001/X14d7/X156', '2019.1.00337.S', 'Pass', '2019-11-21 02:05:40.190', '2019-11-21 03:11:02.876', 'X00000000'),
    ('uid://A002/Xc7111c/X3979', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'Pass', '2017-11-14 03:01:14.310', '2017-11-14 04:12:45.907', 'X00000000'),
    ('uid://A002/Xc7111c/X409e', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'Pass', '2017-11-14 04:20:31.508', '2017-11-14 05:31:58.244', 'X00000001'),
    ('uid://A002/Xc7111c/X86a7', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'Pass', '2017-11-15 03:07:22.915', '2017-11-15 04:18:50.602', 'X00000002'),
    ('uid://A002/Xc72427/X2dfe', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'Pass', '2017-11-16 02:58:03.127', NULL, 'X00000003'),
    ('uid://A002/Xc6c0d7/X7e2b', 'uid://A001/X1284/X25d', '2017.1.00370.S', 'Fail', '2017-11-08 05:44:19.660', '2017-11-08 06:01:33.048', 'X00000000');

-- The shift log of the telescope. An EB may have several entries: queries need DISTINCT.
CREATE TABLE SHIFTLOG_ENTRIES (
    SE_EB_UID TEXT,
    SE_SB_ID TEXT,
    SE_PROJECT_CODE TEXT,
    SE_TYPE TEXT,
    SE_START TEXT
);
INSERT INTO SHIFTLOG_ENTRIES (SE_EB_UID, SE_SB_ID, SE_PROJECT_CODE, SE_TYPE, SE_START) VALUES
    ('uid://A002/Xce574d/Xa33e', 'uid://A001/X12a3/X804', '2017.1.01347.S', 'SBEX', '2018-06-06 12:41:10.826'),
    ('uid://A002/Xce574d/Xa33e', 'uid://A001/X12a3/X804', '2017.1.01347.S', 'QA0', '2018-06-06 13:07:22.036'),
    ('uid://A002/Xcf92df/X3453', 'uid://A001/X12a3/X804', '2017.1.01347.S', 'SBEX', '2018-07-10 10:34:32.962'),
    ('uid://A002/Xcf92df/X3453', 'uid://A001/X12a3/X804', '2017.1.01347.S', 'QA0', '2018-07-10 11:00:46.858'),
    ('uid://A002/Xcd8029/X5e1a', 'uid://A001/X1296/X66b', '2017.1.00727.S', 'SBEX', '2018-05-18 04:12:31.104'),
    ('uid://A002/Xd33a12/X15be', 'uid://A001/X133d/X3ce9', '2018.1.01406.S', 'SBEX', '2018-11-02 03:20:09.452'),
    ('uid://A002/Xf531c1/X2b4d', 'uid://A001/X159a/X61', '2021.1.01582.S', 'SBEX', '2022-01-14 01:47:52.733'),
    ('uid://A002/Xe1d2cb/X4f77', 'uid://A001/X14d7/X156', '2019.1.00337.S', 'SBEX', '2019-11-21 02:05:40.190'),
    ('uid://A002/Xc7111c/X3979', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'SBEX', '2017-11-14 03:01:14.310'),
    ('uid://A002/Xc7111c/X409e', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'SBEX', '2017-11-14 04:20:31.508'),
    ('uid://A002/Xc7111c/X86a7', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'SBEX', '2017-11-15 03:07:22.915'),
    ('uid://A002/Xc72427/X2dfe', 'uid://A001/X1284/X2655', '2017.1.00370.S', 'SBEX', '2017-11-16 02:58:03.127'),
    ('uid://A002/Xc6c0d7/X7e2b', 'uid://A001/X1284/X25d', '2017.1.00370.S', 'SBEX', '2017-11-08 05:44:19.660');

-- What the science archive shows of the EBs. It is incomplete: never the authority for the EBs of a MOUS.
CREATE TABLE ASA_SCIENCE (
    ASDM_UID TEXT,
    MEMBER_OUSS_ID TEXT,
    PROJECT_UID TEXT,
    SCHEDBLOCK_UID TEXT
);
INSERT INTO ASA_SCIENCE (ASDM_UID, MEMBER_OUSS_ID, PROJECT_UID, SCHEDBLOCK_UID) VALUES
    ('uid://A002/Xce574d/Xa33e', 'uid://A001/X12a3/X80e', 'uid://A001/X1221/Xdf8', 'uid://A001/X12a3/X804'),
    ('uid://A002/Xcf92df/X3453', 'uid://A001/X12a3/X80e', 'uid://A001/X1221/Xdf8', 'uid://A001/X12a3/X804'),
    ('uid://A002/Xcd8029/X5e1a', 'uid://A001/X1296/X675', 'uid://A001/X1220/X8c1', 'uid://A001/X1296/X66b'),
    ('uid://A002/Xd33a12/X15be', 'uid://A001/X133d/X3cf3', 'uid://A001/X12f5/X19b', 'uid://A001/X133d/X3ce9'),
    ('uid://A002/Xf531c1/X2b4d', 'uid://A001/X159a/X6b', 'uid://A001/X1528/Xa21', 'uid://A001/X159a/X61'),
    ('uid://A002/Xe1d2cb/X4f77', 'uid://A001/X14d7/X160', 'uid://A001/X1465/X2e4', 'uid://A001/X14d7/X156'),
    ('uid://A002/Xc7111c/X3979', 'uid://A001/X1284/X265f', 'uid://A001/X1220/X2b7', 'uid://A001/X1284/X2655'),
    ('uid://A002/Xc7111c/X409e', 'uid://A001/X1284/X265f', 'uid://A001/X1220/X2b7', 'uid://A001/X1284/X2655'),
    ('uid://A002/Xc7111c/X86a7', 'uid://A001/X1284/X265f', 'uid://A001/X1220/X2b7', 'uid://A001/X1284/X2655'),
    ('uid://A002/Xc72427/X2dfe', 'uid://A001/X1284/X265f', 'uid://A001/X1220/X2b7', 'uid://A001/X1284/X2655');

-- Deliveries to PIs, and from when on anyone may have the data (UTC).
CREATE TABLE ASA_DELIVERY_STATUS (
    DELIVERY_ID TEXT,
    RELEASE_DATE TEXT,
    QA2_PASSED TEXT
);
INSERT INTO ASA_DELIVERY_STATUS (DELIVERY_ID, RELEASE_DATE, QA2_PASSED) VALUES
    ('2017.1.01347.S_uid___A001_X12a3_X80e', '2099-01-01T00:00:00', 'Y'),
    ('2017.1.00727.S_uid___A001_X1296_X675', '2019-06-27T11:02:45', 'Y'),
    ('2018.1.01406.S_uid___A001_X133d_X3cf3', '2099-01-01T00:00:00', 'Y'),
    ('2021.1.01582.S_uid___A001_X159a_X6b', '2099-01-01T00:00:00', 'Y');

-- Which EBs belong to a delivery; DELIVERABLE_NAME is its DELIVERY_ID.
CREATE TABLE ASA_DELIVERY_ASDM_OUS (
    ASDM_UID TEXT,
    DELIVERABLE_NAME TEXT
);
INSERT INTO ASA_DELIVERY_ASDM_OUS (ASDM_UID, DELIVERABLE_NAME) VALUES
    ('uid://A002/Xcf92df/X3453', '2017.1.01347.S_uid___A001_X12a3_X80e'),
    ('uid://A002/Xcd8029/X5e1a', '2017.1.00727.S_uid___A001_X1296_X675'),
    ('uid://A002/Xd33a12/X15be', '2018.1.01406.S_uid___A001_X133d_X3cf3'),
    ('uid://A002/Xf531c1/X2b4d', '2021.1.01582.S_uid___A001_X159a_X6b');

-- Files of a MOUS that the archive keeps, by their name in its storage (NGAS) and their class.
CREATE TABLE ASA_PRODUCT_FILES (
    ASA_OUS_ID TEXT,
    NGAS_FILE_ID TEXT,
    FILE_CLASS TEXT
);

INSERT INTO ASA_PRODUCT_FILES (ASA_OUS_ID, NGAS_FILE_ID, FILE_CLASS) VALUES
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.calimage.pipeline_manifest.xml', 'script'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.hifa_calimage.auxproducts.tgz', 'calibration'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.hifa_calimage.casa_piperestorescript.py', 'script'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.hifa_calimage.casa_pipescript.py', 'script'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.session_2.auxcaltables.tgz', 'calibration'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.session_2.caltables.tgz', 'calibration'),
    ('uid://A001/X12a3/X80e', 'uid___A002_Xcf92df_X3453.ms.calapply.txt', 'calibration'),
    ('uid://A001/X12a3/X80e', 'uid___A002_Xcf92df_X3453.ms.flagversions.tgz', 'calibration'),
    ('uid://A001/X12a3/X80e', 'uid___A002_Xcf92df_X3453_target.ms.auxcalapply.txt', 'calibration'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.scriptForPI.py', 'script'),
    ('uid://A001/X12a3/X80e', 'member.uid___A001_X12a3_X80e.HL_Tau_sci.spw17.mfs.I.pbcor.fits', 'science');

INSERT INTO ASA_PRODUCT_FILES (ASA_OUS_ID, NGAS_FILE_ID, FILE_CLASS) VALUES
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.hifa_calimage.pipeline_manifest.xml', 'script'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.hifa_calimage.auxproducts.tgz', 'calibration'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.hifa_calimage.casa_piperestorescript.py', 'script'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.hifa_calimage.casa_pipescript.py', 'script'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.session_1.auxcaltables.tgz', 'calibration'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.session_1.caltables.tgz', 'calibration'),
    ('uid://A001/X1296/X675', 'uid___A002_Xcd8029_X5e1a.ms.calapply.txt', 'calibration'),
    ('uid://A001/X1296/X675', 'uid___A002_Xcd8029_X5e1a.ms.flagversions.tgz', 'calibration'),
    ('uid://A001/X1296/X675', 'uid___A002_Xcd8029_X5e1a_target.ms.auxcalapply.txt', 'calibration'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.scriptForPI.py', 'script'),
    ('uid://A001/X1296/X675', 'member.uid___A001_X1296_X675.HL_Tau_sci.spw17.mfs.I.pbcor.fits', 'science');

INSERT INTO ASA_PRODUCT_FILES (ASA_OUS_ID, NGAS_FILE_ID, FILE_CLASS) VALUES
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.hifa_calimage.pipeline_manifest.xml', 'script'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.hifa_calimage.auxproducts.tgz', 'calibration'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.hifa_calimage.casa_piperestorescript.py', 'script'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.hifa_calimage.casa_pipescript.py', 'script'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.session_1.auxcaltables.tgz', 'calibration'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.session_1.caltables.tgz', 'calibration'),
    ('uid://A001/X133d/X3cf3', 'uid___A002_Xd33a12_X15be.ms.calapply.txt', 'calibration'),
    ('uid://A001/X133d/X3cf3', 'uid___A002_Xd33a12_X15be.ms.flagversions.tgz', 'calibration'),
    ('uid://A001/X133d/X3cf3', 'uid___A002_Xd33a12_X15be_target.ms.auxcalapply.txt', 'calibration'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.scriptForPI.py', 'script'),
    ('uid://A001/X133d/X3cf3', 'member.uid___A001_X133d_X3cf3.HL_Tau_sci.spw17.mfs.I.pbcor.fits', 'science');

INSERT INTO ASA_PRODUCT_FILES (ASA_OUS_ID, NGAS_FILE_ID, FILE_CLASS) VALUES
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.hifa_calimage.pipeline_manifest.xml', 'script'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.hifa_calimage.auxproducts.tgz', 'calibration'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.hifa_calimage.casa_piperestorescript.py', 'script'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.hifa_calimage.casa_pipescript.py', 'script'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.session_1.auxcaltables.tgz', 'calibration'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.session_1.caltables.tgz', 'calibration'),
    ('uid://A001/X159a/X6b', 'uid___A002_Xf531c1_X2b4d.ms.calapply.txt', 'calibration'),
    ('uid://A001/X159a/X6b', 'uid___A002_Xf531c1_X2b4d.ms.flagversions.tgz', 'calibration'),
    ('uid://A001/X159a/X6b', 'uid___A002_Xf531c1_X2b4d_target.ms.auxcalapply.txt', 'calibration'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.scriptForPI.py', 'script'),
    ('uid://A001/X159a/X6b', 'member.uid___A001_X159a_X6b.HL_Tau_sci.spw17.mfs.I.pbcor.fits', 'science');

INSERT INTO ASA_PRODUCT_FILES (ASA_OUS_ID, NGAS_FILE_ID, FILE_CLASS) VALUES
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.hifa_calimage.pipeline_manifest.xml', 'script'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.hifa_calimage.auxproducts.tgz', 'calibration'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.hifa_calimage.casa_piperestorescript.py', 'script'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.hifa_calimage.casa_pipescript.py', 'script'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.session_1.auxcaltables.tgz', 'calibration'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.session_1.caltables.tgz', 'calibration'),
    ('uid://A001/X14d7/X160', 'uid___A002_Xe1d2cb_X4f77.ms.calapply.txt', 'calibration'),
    ('uid://A001/X14d7/X160', 'uid___A002_Xe1d2cb_X4f77.ms.flagversions.tgz', 'calibration'),
    ('uid://A001/X14d7/X160', 'uid___A002_Xe1d2cb_X4f77_target.ms.auxcalapply.txt', 'calibration'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.scriptForPI.py', 'script'),
    ('uid://A001/X14d7/X160', 'member.uid___A001_X14d7_X160.HL_Tau_sci.spw17.mfs.I.pbcor.fits', 'science');

COMMIT;
